//! Modules of a crate that use each other, directly or through others.
//!
//! Compared are the modules of one folder, each with all below it. A re-exported item counts as one of the module that has it, and
//! what only tests use does not count.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use proc_macro2::{Delimiter, TokenStream, TokenTree};

use super::files;
use crate::cargo::workspace_root;

/// The names of a module or an item, from the root of its crate on.
type Names = Vec<String>;

/// A token and its line; `::` is one.
type Token = (String, usize);

/// A line for each use in the workspace by which a module comes to use itself.
pub(super) fn of_modules() -> Result<Vec<String>> {
    let root = workspace_root();
    let mut folders = vec![root.join("xtask/src")];
    for entry in fs::read_dir(root.join("crates")).context("failed to list crates")? {
        folders.push(entry?.path().join("src"));
    }
    folders.retain(|folder| folder.is_dir());
    folders.sort();
    let mut found = Vec::new();
    for folder in folders {
        let mut sources = Vec::new();
        for path in files::with_extension(&folder, "rs")? {
            let name = path.strip_prefix(root)?.display().to_string();
            let source = fs::read_to_string(&path).with_context(|| format!("failed to read {name}"))?;
            let tokens = files::tokens(&source).with_context(|| format!("failed to read {name}"))?;
            sources.push((module_of(path.strip_prefix(&folder)?), name, tokens));
        }
        found.extend(Modules::of(sources).circles());
    }
    Ok(found)
}

/// The module that a file is, by its path in `src`.
fn module_of(file: &Path) -> Names {
    let file = file.with_extension("");
    let mut names: Names = file.iter().map(|name| name.to_string_lossy().into_owned()).collect();
    let last = names.last().map_or("", String::as_str);
    if last == "mod" || (names.len() == 1 && matches!(last, "lib" | "main")) {
        names.pop();
    }
    names
}

/// The modules of a crate, and what they use.
#[derive(Default)]
struct Modules {
    /// The modules that have a file.
    files: BTreeSet<Names>,
    /// Modules for tests only.
    tests: BTreeSet<Names>,
    /// Imported names, and what they stand for.
    imports: BTreeMap<Names, Names>,
    /// A module, what it uses, and in which line.
    uses: Vec<(Names, Names, String)>,
}

impl Modules {
    /// Reads files: their modules, names and contents.
    fn of(sources: Vec<(Names, String, TokenStream)>) -> Self {
        let mut modules = Self {
            files: sources.iter().map(|(module, ..)| module.clone()).collect(),
            ..Self::default()
        };
        for (module, file, tokens) in sources {
            let mut flat = Vec::new();
            flatten(tokens, &mut flat);
            modules.read(&module, &file, &flat);
        }
        modules
    }

    fn read(&mut self, module: &Names, file: &str, tokens: &[Token]) {
        let text = |at: usize| tokens.get(at).map_or("", |(text, _)| text.as_str());
        let mut at = 0;
        while at < tokens.len() {
            let (name, last) = (text(at), text(at.wrapping_sub(1)));
            let is_module = ["crate", "super", "self"].contains(&name) || self.files.contains(&joined(module, name));
            if (at..at + 7).map(text).eq(["#", "[", "cfg", "(", "test", ")", "]"]) {
                let end = end_of_item(tokens, at + 7);
                if let Some(declared) = (at..end).find(|at| text(*at) == "mod") {
                    self.tests.insert(joined(module, text(declared + 1)));
                }
                at = end;
            } else if is_module && text(at + 1) == "::" && !["::", "$"].contains(&last) {
                let line = tokens[at].1;
                let is_export = last == "use" && ["pub", ")"].contains(&text(at.wrapping_sub(2)));
                let mut paths = Vec::new();
                at = read_path(tokens, at, Vec::new(), &mut paths);
                for (path, alias) in paths {
                    let path = absolute(module, &path);
                    if last == "use" {
                        self.imports.insert(joined(module, &alias), path.clone());
                    }
                    if !is_export {
                        self.uses.push((module.clone(), path, format!("{file}:{line}")));
                    }
                }
            } else {
                at += 1;
            }
        }
    }

    /// The module that has this item, wherever it was imported from.
    fn home(&self, mut path: Names) -> Names {
        // As many imports as may lead to one another.
        for _ in 0..8 {
            let is_module = |length: &usize| self.files.contains(&path[..*length]);
            let module = (0..=path.len()).rev().find(is_module).unwrap_or(0);
            let Some(import) = path.get(..=module).and_then(|name| self.imports.get(name)) else {
                path.truncate(module);
                break;
            };
            path = [import.as_slice(), &path[module + 1..]].concat();
        }
        path
    }

    /// A line for each use of a module by another that it uses too, or that is used by one that it uses.
    fn circles(&self) -> Vec<String> {
        let is_test = |module: &Names| (1..=module.len()).any(|length| self.tests.contains(&module[..length]));
        // Which module of a folder uses which other, and where first.
        let mut arrows: BTreeMap<(&[String], Names), &str> = BTreeMap::new();
        for (from, to, place) in &self.uses {
            let to = self.home(to.clone());
            let common = from.iter().zip(&to).take_while(|(from, to)| from == to).count();
            // A module, and one above it, are no circle.
            if from.len().min(to.len()) > common && !is_test(from) && !is_test(&to) {
                let arrow = (&from[..=common], to[..=common].to_vec());
                arrows.entry(arrow).or_insert(place);
            }
        }
        let leads_to = |start: &[String], end: &[String]| {
            let (mut seen, mut next) = (BTreeSet::new(), vec![start]);
            while let Some(module) = next.pop() {
                if module == end {
                    return true;
                }
                if seen.insert(module) {
                    let used = arrows.keys().filter(|(from, _)| *from == module);
                    next.extend(used.map(|(_, to)| to.as_slice()));
                }
            }
            false
        };
        let circular = arrows.iter().filter(|((from, to), _)| leads_to(to, from));
        let lines = circular.map(|((from, to), place)| {
            let (from, to) = (from.join("::"), to.join("::"));
            format!("{place}: `{from}` uses `{to}`, which comes to use `{from}`")
        });
        lines.collect()
    }
}

fn flatten(tokens: TokenStream, flat: &mut Vec<Token>) {
    for token in tokens {
        let line = token.span().start().line;
        match token {
            TokenTree::Group(group) => {
                let (open, close) = match group.delimiter() {
                    Delimiter::Brace => ("{", "}"),
                    Delimiter::Bracket => ("[", "]"),
                    Delimiter::Parenthesis => ("(", ")"),
                    Delimiter::None => ("", ""),
                };
                flat.push((open.to_owned(), line));
                flatten(group.stream(), flat);
                flat.push((close.to_owned(), line));
            }
            TokenTree::Punct(mark) if mark.as_char() == ':' && flat.last().is_some_and(|(last, _)| last == ":") => {
                flat.pop();
                flat.push(("::".to_owned(), line));
            }
            token => flat.push((token.to_string(), line)),
        }
    }
}

/// Where an item ends that begins at `from`: after its semicolon or block.
fn end_of_item(tokens: &[Token], from: usize) -> usize {
    let mut depth = 0;
    for (at, (text, _)) in tokens.iter().enumerate().skip(from) {
        match text.as_str() {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => depth -= 1,
            _ => {}
        }
        // Less than 0 where it is the last field of a struct.
        if depth < 0 || (depth == 0 && matches!(text.as_str(), ";" | "}")) {
            return at + 1;
        }
    }
    tokens.len()
}

/// Reads a path, or all that begin with it, each with the name that it is imported by. Returns where they end.
fn read_path(tokens: &[Token], mut at: usize, mut path: Names, paths: &mut Vec<(Names, String)>) -> usize {
    let text = |at: usize| tokens.get(at).map_or("", |(text, _)| text.as_str());
    loop {
        match text(at) {
            "{" => {
                while !matches!(text(at), "}" | "") {
                    at = read_path(tokens, at + 1, path.clone(), paths);
                }
                return at + 1;
            }
            // After the last comma.
            "}" => return at,
            "self" if !path.is_empty() => {}
            "*" | "<" => {}
            name => path.push(name.to_owned()),
        }
        if text(at + 1) != "::" {
            break;
        }
        at += 2;
    }
    let is_renamed = text(at + 1) == "as";
    let last = path.last().cloned().unwrap_or_default();
    let alias = if is_renamed { text(at + 2).to_owned() } else { last };
    paths.push((path, alias));
    if is_renamed { at + 3 } else { at + 1 }
}

/// A path in a module, from the root of the crate on.
fn absolute(module: &[String], path: &[String]) -> Names {
    let is_from_root = path.first().is_some_and(|name| name == "crate");
    let mut absolute = if is_from_root { Vec::new() } else { module.to_vec() };
    for name in path {
        match name.as_str() {
            "crate" | "self" => {}
            "super" => drop(absolute.pop()),
            _ => absolute.push(name.clone()),
        }
    }
    absolute
}

fn joined(module: &[String], name: &str) -> Names {
    [module, &[name.to_owned()]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn circles(sources: &[(&str, &str)]) -> Vec<String> {
        let read = |(file, source): &(&str, &str)| {
            let tokens = files::tokens(source).unwrap();
            (module_of(Path::new(file)), (*file).to_owned(), tokens)
        };
        Modules::of(sources.iter().map(read).collect()).circles()
    }

    #[test]
    fn modules_that_use_each_other_are_told_with_the_lines() {
        let found = circles(&[
            ("lib.rs", "mod a; mod b; mod c;"),
            ("a.rs", "use crate::b::B;"),
            ("b/mod.rs", "mod inner;"),
            ("b/inner.rs", "fn f() {\n    crate::c::g();\n}"),
            ("c.rs", "use std::fmt;\nuse super::{a::{self, A}, x};"),
        ]);
        assert_eq!(
            found,
            [
                "a.rs:1: `a` uses `b`, which comes to use `a`",
                "b/inner.rs:2: `b` uses `c`, which comes to use `b`",
                "c.rs:2: `c` uses `a`, which comes to use `c`",
            ]
        );
    }

    #[test]
    fn an_item_is_one_of_the_module_that_has_it() {
        let sources = [
            ("m/mod.rs", "mod a; mod b; pub use a::A; use b::B as Renamed;"),
            ("m/a.rs", "use super::Renamed;"),
            ("m/b.rs", "use crate::m::A;"),
        ];
        assert_eq!(circles(&sources).len(), 2);
    }

    #[test]
    fn a_parent_and_its_modules_may_use_each_other() {
        let sources = [
            ("m/mod.rs", "mod a; use self::a::A; struct M;"),
            ("m/a.rs", "use super::M; use crate::other;"),
            ("other.rs", ""),
        ];
        assert!(circles(&sources).is_empty());
    }

    #[test]
    fn tests_may_use_anything() {
        let sources = [
            ("lib.rs", "mod a; mod b; #[cfg(test)] mod rig;"),
            ("a.rs", "use crate::b::B;"),
            (
                "b.rs",
                "#[cfg(test)]\nuse crate::a::A;\n#[cfg(test)]\nmod tests {\n    use crate::a::A;\n}",
            ),
            ("rig.rs", "use crate::b::B;"),
        ];
        assert!(circles(&sources).is_empty());
    }
}
