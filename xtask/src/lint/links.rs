//! Links between pages of the documentation and to their headings.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

use super::files;
use crate::cargo::workspace_root;

/// Returns the broken links, one a line. Links to other hosts are not checked.
pub(super) fn broken() -> Result<Vec<String>> {
    let root = workspace_root();
    let mut problems = Vec::new();
    for path in files::with_extension(root, "md")? {
        let name = path.strip_prefix(root).expect("it was found there");
        problems.extend(
            Page::read(&path)?
                .links
                .iter()
                .filter_map(|link| Some(format!("{}: {link}: {}", name.display(), problem(&path, link)?))),
        );
    }
    Ok(problems)
}

/// Returns why the link from this page is broken.
fn problem(page: &Path, link: &str) -> Option<String> {
    if is_elsewhere(link) {
        return None;
    }
    let (file, heading) = link.split_once('#').unwrap_or((link, ""));
    let target: PathBuf = match file {
        "" => page.to_owned(),
        file => page.parent().unwrap_or(page).join(file),
    };
    if !target.exists() {
        return Some("no such file".to_owned());
    }
    if heading.is_empty() {
        return None;
    }
    match Page::read(&target) {
        Ok(target) if target.anchors.contains(heading) => None,
        Ok(_) => Some("no such heading".to_owned()),
        Err(error) => Some(format!("{error:#}")),
    }
}

/// Whether the link has a scheme, such as `https:`.
fn is_elsewhere(link: &str) -> bool {
    link.split_once(':')
        .is_some_and(|(scheme, _)| !scheme.is_empty() && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric()))
}

/// The links of a Markdown page, and its link targets.
#[derive(Debug, Default, PartialEq, Eq)]
struct Page {
    links: Vec<String>,
    anchors: HashSet<String>,
}

impl Page {
    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))?;
        Ok(Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let mut page = Self::default();
        let mut heading: Option<String> = None;
        for event in Parser::new_ext(text, Options::ENABLE_TABLES) {
            match event {
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                    page.links.push(dest_url.into_string());
                }
                Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
                Event::Text(text) | Event::Code(text) => {
                    if let Some(heading) = &mut heading {
                        heading.push_str(&text);
                    }
                }
                Event::End(TagEnd::Heading(_)) => {
                    page.anchors.extend(heading.take().map(|heading| anchor(&heading)));
                }
                _ => {}
            }
        }
        page
    }
}

/// The anchor that GitHub makes of the text of a heading.
fn anchor(heading: &str) -> String {
    heading
        .to_lowercase()
        .chars()
        .filter(|char| char.is_alphanumeric() || matches!(char, ' ' | '-' | '_'))
        .map(|char| if char == ' ' { '-' } else { char })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_headings_are_found() {
        let page = Page::parse(
            "# `pagecast`: what, and why?\n\n| a |\n| - |\n| [b](docs/b.md#c) |\n\n```\n[no](link)\n```\n![d][e]\n\n[e]: f.png\n",
        );
        assert_eq!(page.links, ["docs/b.md#c", "f.png"]);
        assert_eq!(page.anchors, HashSet::from(["pagecast-what-and-why".to_owned()]));
    }

    #[test]
    fn only_links_that_lead_nowhere_are_problems() {
        let folder = tempfile::tempdir().unwrap();
        let page = folder.path().join("page.md");
        fs::create_dir(folder.path().join("docs")).unwrap();
        fs::write(&page, "# A heading\n").unwrap();
        fs::write(folder.path().join("docs/other.md"), "## Another\n").unwrap();

        for good in [
            "docs/other.md",
            "docs/other.md#another",
            "docs",
            "#a-heading",
            "page.md",
            "https://example.org/nowhere",
            "mailto:nobody@example.org",
        ] {
            assert_eq!(problem(&page, good), None, "{good}");
        }
        for bad in [
            "other.md",
            "docs/other.md#missing",
            "#another",
            "docs#heading",
            "/page.md",
        ] {
            assert!(problem(&page, bad).is_some(), "{bad}");
        }
    }
}
