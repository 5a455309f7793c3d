//! Tests must report a skip through `pagecast_testkit::skip`, which counts skips, and fails in CI if a skip is wrong.

use anyhow::Result;
use proc_macro2::{TokenStream, TokenTree};

use super::files;

/// Files that may print the word "skipped".
const PLACES: [&str; 2] = ["crates/testkit/src/skip.rs", "xtask/src"];

/// Macros that print.
const PRINTING: [&str; 6] = ["print", "println", "eprint", "eprintln", "write", "writeln"];

/// Returns the places where a skip is printed by hand, one a line.
pub(super) fn printed_by_hand() -> Result<Vec<String>> {
    files::problems_in_rust(
        &PLACES,
        "report a skipped test with `pagecast_testkit::skip::skip`",
        lines_that_print_it,
    )
}

/// The lines, from 1 on, of macros that print a text with the word "skipped".
fn lines_that_print_it(tokens: TokenStream) -> Vec<usize> {
    let mut lines = Vec::new();
    collect(tokens, &mut lines);
    lines
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
        assert_eq!(lines_that_print_it(files::tokens(source).unwrap()), [2, 3]);
    }

    #[test]
    fn other_words_and_other_uses_are_not() {
        let source = "// println!(\"skipped\")\nfn f() { skip(\"skipped\"); println!(\"skip\"); let skipped = 1; }\n";
        assert!(lines_that_print_it(files::tokens(source).unwrap()).is_empty());
    }
}
