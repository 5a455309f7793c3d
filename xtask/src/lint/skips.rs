//! Skipped tests are told by `pagecast_testkit::skip` alone, which counts them and fails in CI.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow};
use proc_macro2::{TokenStream, TokenTree};

use super::files;
use crate::cargo::workspace_root;

/// Files that may print the word.
const PLACES: [&str; 2] = ["crates/testkit/src/skip.rs", "xtask/src"];

/// Macros that print.
const PRINTING: [&str; 6] = ["print", "println", "eprint", "eprintln", "write", "writeln"];

/// Where else something is said to be skipped: a line for each place.
pub(super) fn printed_by_hand() -> Result<Vec<String>> {
    let root = workspace_root();
    let mut found = Vec::new();
    for path in files::with_extension(root, "rs")? {
        let name = path.strip_prefix(root).expect("it was found there");
        if PLACES.iter().any(|place| name.starts_with(place)) {
            continue;
        }
        let source = fs::read_to_string(&path).with_context(|| format!("failed to read {}", name.display()))?;
        let lines = lines_that_print_it(&source).with_context(|| format!("failed to read {}", name.display()))?;
        found.extend(lines.iter().map(|line| problem(name, *line)));
    }
    Ok(found)
}

fn problem(file: &Path, line: usize) -> String {
    format!(
        "{}:{line}: say with `pagecast_testkit::skip::skip` that a test is skipped",
        file.display()
    )
}

/// The lines, from 1 on, of macros that print a text with the word "skipped".
fn lines_that_print_it(source: &str) -> Result<Vec<usize>> {
    let tokens: TokenStream = source.parse().map_err(|error| anyhow!("not Rust: {error}"))?;
    let mut lines = Vec::new();
    collect(tokens, &mut lines);
    Ok(lines)
}

fn collect(tokens: TokenStream, lines: &mut Vec<usize>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    for (index, token) in tokens.iter().enumerate() {
        let TokenTree::Group(group) = token else { continue };
        if let Some([TokenTree::Ident(name), TokenTree::Punct(mark)]) =
            index.checked_sub(2).map(|at| &tokens[at..index])
            && mark.as_char() == '!'
            && PRINTING.iter().any(|printing| name == printing)
            && says_it(group.stream())
        {
            lines.push(name.span().start().line);
        }
        collect(group.stream(), lines);
    }
}

fn says_it(tokens: TokenStream) -> bool {
    tokens
        .into_iter()
        .any(|token| matches!(token, TokenTree::Literal(text) if text.to_string().to_lowercase().contains("skipped")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skip_that_is_printed_by_hand_is_found() {
        let source = "fn f() {\n  println!(\"skipped: no root\");\n  g(|| { eprintln!(\n  \"Skipped {}\", 1) });\n}\n";
        assert_eq!(lines_that_print_it(source).unwrap(), [2, 3]);
    }

    #[test]
    fn other_words_and_other_uses_are_not() {
        let source = "// println!(\"skipped\")\nfn f() { skip(\"skipped\"); println!(\"skip\"); let skipped = 1; }\n";
        assert!(lines_that_print_it(source).unwrap().is_empty());
    }
}
