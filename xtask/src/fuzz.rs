//! `cargo xtask fuzz`: libFuzzer on the targets of `crates/fuzz`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use comfy_table::{Table, presets};
use pagecast_fuzz::TARGETS;

use crate::cargo::{built_executable, cargo, metadata, workspace_root};

/// The longest input, in bytes.
const MOST_BYTES: u32 = 8192;

/// Time for one input in seconds. An input that takes longer is a finding.
const INPUT_SECONDS: u32 = 60;

/// Memory of a target in mebibytes. More is a finding.
const MOST_MEMORY: u32 = 1024;

/// Fuzz all parsers of bytes from outside: a minute for each target, several at once
///
/// Starts from the corpus in `crates/fuzz/corpus`. Keeps new inputs and findings in `target/pagecast/fuzz`. Needs a C++
/// compiler, for libFuzzer.
#[derive(Debug, clap::Args)]
pub(crate) struct Fuzz {
    /// Targets to fuzz; all by default
    #[arg(value_parser = TARGETS.map(|target| target.name))]
    targets: Vec<String>,
    /// Time for each target
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u32,
    /// Number of targets at once; one a processor by default
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Afterwards, replace the corpus in `crates/fuzz/corpus` by a minimal one that covers the same edges as it and the
    /// new inputs
    #[arg(long)]
    minimize: bool,
}

impl Fuzz {
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let program = build()?;
        let folder = Folder {
            path: metadata()?.target_directory.join("pagecast/fuzz").into(),
        };
        let targets: Vec<&str> = if self.targets.is_empty() {
            TARGETS.iter().map(|target| target.name).collect()
        } else {
            self.targets.iter().map(String::as_str).collect()
        };
        let jobs = match self.jobs {
            Some(jobs) => jobs.max(1),
            None => thread::available_parallelism().map_or(1, Into::into),
        };
        eprintln!(
            "fuzzing {} targets, {} s each, {jobs} at once",
            targets.len(),
            self.seconds
        );
        let queue = Mutex::new(targets.iter().copied().enumerate());
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || {
            let mut outcomes = Vec::new();
            while let Some((index, target)) = next() {
                outcomes.push((index, self.fuzz(&program, &folder, target)));
            }
            outcomes
        };
        let mut outcomes: Vec<(usize, Result<Outcome>)> = thread::scope(|scope| {
            let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
            let ended = workers
                .into_iter()
                .map(|worker| worker.join().expect("it does not panic"));
            ended.flatten().collect()
        });
        outcomes.sort_by_key(|(index, _)| *index);
        let outcomes = outcomes
            .into_iter()
            .map(|(_, outcome)| outcome)
            .collect::<Result<Vec<_>>>()?;
        println!("{}", table(&outcomes));
        let mut code = ExitCode::SUCCESS;
        for finding in outcomes.iter().filter_map(|outcome| outcome.finding.as_ref()) {
            eprintln!("{finding}");
            code = ExitCode::FAILURE;
        }
        if self.minimize {
            for target in targets {
                folder.minimize(&program, target)?;
            }
        }
        Ok(code)
    }

    fn fuzz(&self, program: &Path, folder: &Folder, target: &str) -> Result<Outcome> {
        let grown = folder.of(target, "corpus")?;
        let findings = folder.of(target, "findings")?;
        let log = folder.path.join(target).join("log");
        // A fuzzer leaves its temporary files behind.
        let temporary = tempfile::tempdir_in(folder.of(target, "")?).context("failed to make a temporary folder")?;
        let mut fuzzer = fuzzer(program, target);
        fuzzer
            .env("TMPDIR", temporary.path())
            .arg(format!("-max_total_time={}", self.seconds))
            .arg(format!("-max_len={MOST_BYTES}"))
            .arg(format!("-timeout={INPUT_SECONDS}"))
            .arg(format!("-rss_limit_mb={MOST_MEMORY}"))
            .arg("-print_final_stats=1")
            // The trailing slash makes it a folder.
            .arg(format!("-artifact_prefix={}/", findings.display()))
            .args([&grown, &committed(target)]);
        let ended = run(&mut fuzzer, &log)?;
        let text = fs::read_to_string(&log).with_context(|| format!("failed to read {}", log.display()))?;
        let finding = (!ended.success()).then(|| {
            let last: Vec<&str> = text.lines().rev().take(30).collect();
            let last: Vec<&str> = last.into_iter().rev().collect();
            format!(
                "{target}: {ended}\n{}\nThe input is in {}, the whole log in {}. Once mended, add the input to {}.\n",
                last.join("\n"),
                findings.display(),
                log.display(),
                committed(target).display(),
            )
        });
        Ok(Outcome {
            target: target.to_owned(),
            executions: after(&text, "stat::number_of_executed_units:"),
            coverage: after(&text, " cov:"),
            features: after(&text, " ft:"),
            finding,
        })
    }
}

/// The result of a target.
struct Outcome {
    target: String,
    executions: Option<u64>,
    coverage: Option<u64>,
    features: Option<u64>,
    finding: Option<String>,
}

fn table(outcomes: &[Outcome]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    if !console::colors_enabled() {
        table.force_no_tty();
    }
    table.set_header(["target", "inputs run", "edges covered", "features", "found"]);
    let number = |number: Option<u64>| number.map_or_else(|| "unknown".to_owned(), |number| number.to_string());
    for outcome in outcomes {
        table.add_row([
            outcome.target.clone(),
            number(outcome.executions),
            number(outcome.coverage),
            number(outcome.features),
            if outcome.finding.is_some() {
                "a failure"
            } else {
                "nothing"
            }
            .to_owned(),
        ]);
    }
    table
}

/// The number after the last `mark` in the output of libFuzzer.
fn after(text: &str, mark: &str) -> Option<u64> {
    let (_, rest) = text.rsplit_once(mark)?;
    rest.split_whitespace().next()?.parse().ok()
}

/// Folder of inputs and findings that are not committed.
struct Folder {
    path: PathBuf,
}

impl Folder {
    /// Returns a folder of a target, and creates it if it is missing.
    fn of(&self, target: &str, name: &str) -> Result<PathBuf> {
        let folder = self.path.join(target).join(name);
        fs::create_dir_all(&folder).with_context(|| format!("failed to make {}", folder.display()))?;
        Ok(folder)
    }

    /// Replaces the committed corpus of a target by the smallest one that reaches all edges of it and of the new
    /// inputs.
    fn minimize(&self, program: &Path, target: &str) -> Result<()> {
        let committed = committed(target);
        // Beside it, and so on the same file system.
        let smallest = committed.with_extension("new");
        fs::create_dir_all(&smallest).with_context(|| format!("failed to make {}", smallest.display()))?;
        let log = self.path.join(target).join("log-of-merge");
        let mut merge = fuzzer(program, target);
        // Without counters, inputs that differ only in how often they reach an edge are the same.
        merge.args(["-set_cover_merge=1", "-use_counters=0"]).args([
            &smallest,
            &committed,
            &self.of(target, "corpus")?,
        ]);
        ensure!(
            run(&mut merge, &log)?.success(),
            "the corpus of {target} cannot be merged; see {}",
            log.display()
        );
        fs::remove_dir_all(&committed)
            .and_then(|()| fs::rename(&smallest, &committed))
            .with_context(|| format!("failed to replace {}", committed.display()))
    }
}

/// Folder of the committed corpus of a target.
fn committed(target: &str) -> PathBuf {
    workspace_root().join("crates/fuzz/corpus").join(target)
}

fn fuzzer(program: &Path, target: &str) -> Command {
    let mut fuzzer = Command::new(program);
    fuzzer.env("PAGECAST_FUZZ_TARGET", target);
    fuzzer
}

/// Runs the fuzzer to its end, with its output in the file `log`.
fn run(fuzzer: &mut Command, log: &Path) -> Result<ExitStatus> {
    let failed = || format!("failed to write {}", log.display());
    let output = File::create(log).with_context(failed)?;
    let errors = output.try_clone().with_context(failed)?;
    fuzzer
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .status()
        .with_context(|| format!("failed to start {fuzzer:?}"))
}

/// Builds the fuzzer. Returns its path.
fn build() -> Result<PathBuf> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let found = Command::new(&compiler).arg("--version").stdout(Stdio::null()).status();
    ensure!(
        found.is_ok_and(|status| status.success()),
        "{compiler} is missing: libFuzzer needs a C++ compiler: install one (`apt-get install g++`), or name one with CXX"
    );
    eprintln!("building the fuzzer");
    // All packages are named, so that dependencies have the same features as in other builds, and are not built again.
    built_executable(
        cargo("build")
            .args(["--locked", "--quiet", "--workspace", "--example", "fuzz"])
            .args(["--features", "pagecast-fuzz/libfuzzer"])
            .env(
                "RUSTC_WORKSPACE_WRAPPER",
                workspace_root().join("crates/fuzz/rustc-with-coverage"),
            ),
    )
    .context("the fuzzer does not build")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_number_after_a_mark_counts() {
        let text = "#2\tINITED cov: 14 ft: 15 corp: 1/1b\n#9\tNEW    cov: 20 ft: 31 corp: 2/2b\nstat::number_of_executed_units: 77\n";
        assert_eq!(after(text, " cov:"), Some(20));
        assert_eq!(after(text, " ft:"), Some(31));
        assert_eq!(after(text, "stat::number_of_executed_units:"), Some(77));
        assert_eq!(after(text, "stat::peak_rss_mb:"), None);
    }
}
