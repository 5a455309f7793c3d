//! `unsafe` is for the crate that wraps the kernel, and for what has no other way.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow};
use proc_macro2::{TokenStream, TokenTree};

use super::files;
use crate::cargo::workspace_root;

/// Files and folders that may hold unsafe code.
const PLACES: [&str; 3] = ["crates/uffd", "crates/testkit/src/memory.rs", "crates/testkit/guest"];

/// Where else there is unsafe code: a line for each place.
pub(super) fn misplaced() -> Result<Vec<String>> {
    let root = workspace_root();
    let mut found = Vec::new();
    for path in files::with_extension(root, "rs")? {
        let name = path.strip_prefix(root).expect("it was found there");
        if PLACES.iter().any(|place| name.starts_with(place)) {
            continue;
        }
        let source = fs::read_to_string(&path).with_context(|| format!("failed to read {}", name.display()))?;
        let lines = lines_with_unsafe(&source).with_context(|| format!("failed to read {}", name.display()))?;
        found.extend(lines.iter().map(|line| problem(name, *line)));
    }
    Ok(found)
}

fn problem(file: &Path, line: usize) -> String {
    format!(
        "{}:{line}: unsafe code belongs in {}",
        file.display(),
        PLACES.join(", ")
    )
}

/// The lines, from 1 on, with the keyword: not in a comment, a string or the name of a lint.
fn lines_with_unsafe(source: &str) -> Result<Vec<usize>> {
    let tokens: TokenStream = source.parse().map_err(|error| anyhow!("not Rust: {error}"))?;
    let mut lines = Vec::new();
    collect(tokens, &mut lines);
    Ok(lines)
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
        assert_eq!(lines_with_unsafe(source).unwrap(), [2, 4, 5]);
    }

    #[test]
    fn talking_about_it_is_not_doing_it() {
        let source = "#![forbid(unsafe_code)]\n/// unsafe\n// unsafe\nconst A: &str = \"unsafe\"; /* unsafe */\n";
        assert!(lines_with_unsafe(source).unwrap().is_empty());
    }
}
