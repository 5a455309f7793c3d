//! A list of names and values, one pair a line.

use std::fmt::Display;

use pagecast_command::harmless;

/// Names and values, in the order in which they were added.
#[derive(Debug, Default)]
pub(crate) struct Facts {
    facts: Vec<(&'static str, String)>,
}

impl Facts {
    /// Adds a pair. Control characters in the value are escaped.
    pub(crate) fn add(&mut self, name: &'static str, value: impl Display) {
        self.facts.push((name, harmless(&value.to_string())));
    }

    /// The pairs, one a line, with the values in one column.
    pub(crate) fn text(&self) -> String {
        let width = self.facts.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
        let lines = self
            .facts
            .iter()
            .map(|(name, value)| format!("{name:width$}  {value}\n"));
        lines.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stand_in_one_column() {
        let mut facts = Facts::default();
        facts.add("fork", "a");
        facts.add("pid", 17);
        facts.add("error", "\u{1b}[2J");
        assert_eq!(facts.text(), "fork   a\npid    17\nerror  \\u{1b}[2J\n");
    }
}
