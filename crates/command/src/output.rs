//! Output of a command on stdout: for people on a terminal, for programs in a pipe.
//!
//! Sizes are printed with `indicatif::BinaryBytes`. A reader that has gone (a broken pipe) is never an error.

use std::io::{self, ErrorKind, IsTerminal as _, Write};

use anyhow::{Context as _, Result};
use comfy_table::{Cell, CellAlignment, Table, presets};
use console::Style;
use serde::Serialize;

/// Standard output, and its capabilities.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    terminal: bool,
    colours: bool,
}

/// A column of a table: its heading and alignment.
#[derive(Clone, Copy, Debug)]
pub enum Column {
    /// Words, aligned to the left.
    Text(&'static str),
    /// Numbers, aligned to the right.
    Number(&'static str),
}

impl Output {
    /// Standard output. Colours are on for a terminal, unless `NO_COLOR` is set, or always with `CLICOLOR_FORCE`.
    pub fn stdout() -> Self {
        Self {
            terminal: io::stdout().is_terminal(),
            colours: console::colors_enabled(),
        }
    }

    /// Returns the text in this style, or plain if there are no colours.
    pub fn styled(self, style: &Style, text: &str) -> String {
        style.clone().force_styling(self.colours).apply_to(text).to_string()
    }

    /// Formats a table: with lines around its cells on a terminal, else in plain columns. Ends with a line feed.
    pub fn table(self, columns: &[Column], rows: Vec<Vec<Cell>>) -> String {
        let mut table = Table::new();
        table.load_style(if self.terminal {
            presets::UTF8_FULL_CONDENSED
        } else {
            presets::NOTHING
        });
        if self.colours {
            table.enforce_styling();
        } else {
            table.force_no_tty();
        }
        table.set_header(columns.iter().map(|column| column.heading()));
        table.add_rows(rows);
        for (drawn, column) in table.column_iter_mut().zip(columns) {
            drawn.set_cell_alignment(column.alignment());
            if !self.terminal {
                drawn.set_padding((0, 2));
            }
        }
        table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
    }

    /// Formats the table in Markdown.
    pub fn markdown(columns: &[Column], rows: Vec<Vec<Cell>>) -> String {
        let mut table = Table::new();
        table.load_style(presets::ASCII_MARKDOWN);
        table.force_no_tty();
        table.set_header(columns.iter().map(|column| column.heading()));
        table.add_rows(rows);
        for (drawn, column) in table.column_iter_mut().zip(columns) {
            drawn.set_cell_alignment(column.alignment());
        }
        // The style has no alignment; Markdown does.
        let marks = columns.iter().map(|column| match column {
            Column::Text(_) => " --- |",
            Column::Number(_) => " ---: |",
        });
        let marks = format!("|{}", marks.collect::<String>());
        let lines = table.lines().enumerate();
        lines
            .map(|(number, line)| if number == 1 { marks.clone() } else { line } + "\n")
            .collect()
    }

    /// Prints text, to the last byte.
    ///
    /// # Errors
    ///
    /// The text could not be written (a full disk). A broken pipe is no error.
    pub fn print(self, text: &str) -> Result<()> {
        write_to(&mut io::stdout().lock(), text)
    }

    /// Prints JSON: on several lines on a terminal, else on one.
    ///
    /// # Errors
    ///
    /// Those of [`print`](Self::print).
    pub fn print_json(self, value: &impl Serialize) -> Result<()> {
        self.print(&self.json(value)?)
    }

    /// Formats JSON as [`print_json`](Self::print_json) does.
    ///
    /// # Errors
    ///
    /// The value has no form in JSON.
    pub fn json(self, value: &impl Serialize) -> Result<String> {
        let json = if self.terminal {
            serde_json::to_string_pretty(value)
        } else {
            serde_json::to_string(value)
        };
        Ok(json.context("cannot write the answer as JSON")? + "\n")
    }
}

impl Column {
    fn heading(self) -> &'static str {
        match self {
            Self::Text(heading) | Self::Number(heading) => heading,
        }
    }

    fn alignment(self) -> CellAlignment {
        match self {
            Self::Text(_) => CellAlignment::Left,
            Self::Number(_) => CellAlignment::Right,
        }
    }
}

/// Escapes the control characters in the text, so that foreign text cannot move the cursor.
pub fn harmless(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}

fn write_to(to: &mut impl Write, text: &str) -> Result<()> {
    // Flushed here, where an error is noticed; at the exit it would not be.
    match to.write_all(text.as_bytes()).and_then(|()| to.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot write to stdout"),
    }
}

#[cfg(test)]
mod tests {
    use comfy_table::Color;

    use super::*;

    const PIPE: Output = Output {
        terminal: false,
        colours: false,
    };
    const TERMINAL: Output = Output {
        terminal: true,
        colours: true,
    };
    const COLUMNS: [Column; 2] = [Column::Text("fork"), Column::Number("faults")];

    fn rows() -> Vec<Vec<Cell>> {
        let row = |id: &str, faults| vec![Cell::new(id).fg(Color::Green), Cell::new(faults)];
        vec![row("a", 1), row("longer", 22_000_000)]
    }

    #[test]
    fn a_table_in_a_pipe_is_plain_columns() {
        let table = PIPE.table(&COLUMNS, rows());
        assert_eq!(table, "fork      faults\na              1\nlonger  22000000\n");
    }

    #[test]
    fn a_table_on_a_terminal_has_lines_and_colours() {
        let table = TERMINAL.table(&COLUMNS, rows());
        assert!(table.contains('┌') && table.contains("\u{1b}["), "{table}");
        let without_colours = Output {
            colours: false,
            ..TERMINAL
        };
        let table = without_colours.table(&COLUMNS, rows());
        assert!(table.contains('┌') && !table.contains('\u{1b}'), "{table}");
    }

    #[test]
    fn a_table_in_markdown_says_to_which_side_its_columns_go() {
        let table = Output::markdown(&COLUMNS, rows());
        assert_eq!(
            table,
            "| fork   |   faults |\n| --- | ---: |\n| a      |        1 |\n| longer | 22000000 |\n"
        );
    }

    #[test]
    fn json_is_one_line_in_a_pipe() {
        let value = serde_json::json!({"a": [1, 2]});
        assert_eq!(PIPE.json(&value).unwrap(), "{\"a\":[1,2]}\n");
        assert!(TERMINAL.json(&value).unwrap().lines().count() > 1);
    }

    #[test]
    fn styles_are_for_colours_only() {
        let style = Style::new().red();
        assert_eq!(PIPE.styled(&style, "no"), "no");
        assert_eq!(TERMINAL.styled(&style, "no"), "\u{1b}[31mno\u{1b}[0m");
    }

    #[test]
    fn control_characters_are_shown() {
        assert_eq!(harmless("grün \u{1b}[2J\r\n\u{9b}"), "grün \\u{1b}[2J\\r\\n\\u{9b}");
    }

    #[test]
    fn a_reader_who_has_gone_is_no_error_and_a_full_disk_is() {
        let (reader, mut writer) = io::pipe().unwrap();
        drop(reader);
        write_to(&mut writer, "text").unwrap();
        #[cfg(target_os = "linux")]
        {
            let mut full = std::fs::File::options().write(true).open("/dev/full").unwrap();
            let error = write_to(&mut full, "text").unwrap_err();
            assert_eq!(error.to_string(), "cannot write to stdout");
        }
    }
}
