//! `unsafe` is allowed only in the crate that wraps the kernel, and in a few other files.

use anyhow::Result;
use proc_macro2::{TokenStream, TokenTree};

use super::files;

/// Files and folders that may hold unsafe code.
const PLACES: [&str; 3] = ["crates/uffd", "crates/testkit/src/memory.rs", "crates/testkit/guest"];

/// Returns the places with unsafe code elsewhere, one a line.
pub(super) fn misplaced() -> Result<Vec<String>> {
    files::problems_in_rust(
        &PLACES,
        &format!("unsafe code belongs in {}", PLACES.join(", ")),
        lines_with_unsafe,
    )
}

/// Returns the lines, from 1 on, with the keyword outside of comments, strings and names of lints.
fn lines_with_unsafe(tokens: TokenStream) -> Vec<usize> {
    let mut lines = Vec::new();
    collect(tokens, &mut lines);
    lines
}

fn collect(tokens: TokenStream, lines: &mut Vec<usize>) {
    for token in tokens {
        match token {
            TokenTree::Group(group) => collect(group.stream(), lines),
            TokenTree::Ident(name) if name == "unsafe" => lines.push(name.span().start().line),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keyword_is_found_wherever_code_is() {
        let source = "fn f() {\n  g!(unsafe { h() });\n}\n#[unsafe(no_mangle)]\nunsafe extern \"C\" {}\n";
        assert_eq!(lines_with_unsafe(files::tokens(source).unwrap()), [2, 4, 5]);
    }

    #[test]
    fn talking_about_it_is_not_doing_it() {
        let source = "#![forbid(unsafe_code)]\n/// unsafe\n// unsafe\nconst A: &str = \"unsafe\"; /* unsafe */\n";
        assert!(lines_with_unsafe(files::tokens(source).unwrap()).is_empty());
    }
}
