//! The one door to every task of this project.
fn main() {}
