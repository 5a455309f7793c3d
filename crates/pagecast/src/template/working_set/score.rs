//! How well the prefaults of a template do.

use serde::Serialize;

/// Fewer held-out pages than this tell too little.
const ENOUGH: u64 = 64;

/// Once so many held-out pages are counted, what was counted before counts half: it follows the workload.
const MANY: u64 = 1024;

/// A prefault of which less than one page in so many is used costs more than it saves: installing a page ahead takes between
/// a fifth and a twentieth of what answering its fault does, but the memory of a page that nobody uses is lost for good.
const WORTH: u64 = 4;

/// How well the prefault of one fork has foreseen its faults, while it was watched. Small pages (4 KiB).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PrefaultTally {
    /// In the working set.
    pub planned: u64,
    /// Those of them that were held out, to see whether they would be asked for.
    pub held_out: u64,
    /// Those of these that were asked for.
    pub held_out_used: u64,
    /// To be installed ahead, and asked for before their turn had come.
    pub late: u64,
    /// Asked for, and not in the working set.
    pub missed: u64,
}

/// How well the prefaults of a template have done lately.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PrefaultScore {
    /// How many forks this is about.
    pub forks: u64,
    /// The part of what was installed ahead that was used, from 0 to 1: the held-out pages stand for all. `None` where too
    /// little is known.
    pub precision: Option<f64>,
    /// The part of what was used that had been foreseen, from 0 to 1.
    pub recall: Option<f64>,
    /// Too little of it is used: forks get no working set ahead until there is another one.
    pub switched_off: bool,
}

/// Adds tallies up.
#[derive(Debug, Default)]
pub(in crate::template) struct Tallies {
    forks: u64,
    sum: PrefaultTally,
}

impl Tallies {
    pub(in crate::template) fn add(&mut self, tally: PrefaultTally) {
        let sum = &mut self.sum;
        if sum.held_out >= MANY {
            for count in [
                &mut sum.planned,
                &mut sum.held_out,
                &mut sum.held_out_used,
                &mut sum.late,
                &mut sum.missed,
            ] {
                *count /= 2;
            }
        }
        self.forks += 1;
        sum.planned += tally.planned;
        sum.held_out += tally.held_out;
        sum.held_out_used += tally.held_out_used;
        sum.late += tally.late;
        sum.missed += tally.missed;
    }

    pub(in crate::template) fn score(&self) -> PrefaultScore {
        let PrefaultTally {
            planned,
            held_out,
            held_out_used,
            late,
            missed,
        } = self.sum;
        let part = |some: f64, all: f64| (all > 0.0).then(|| (some / all).min(1.0));
        #[expect(clippy::cast_precision_loss, reason = "counts of pages, far below 2^52")]
        let float = |count: u64| count as f64;
        let enough = held_out >= ENOUGH;
        let precision = part(float(held_out_used), float(held_out)).filter(|_| enough);
        // What was late is known to be used; of what was installed in time, the held-out pages tell the part.
        let foreseen = precision.map(|precision| {
            float(late) + float(held_out_used) + precision * float(planned.saturating_sub(held_out + late))
        });
        PrefaultScore {
            forks: self.forks,
            precision,
            recall: foreseen.and_then(|foreseen| part(foreseen, foreseen + float(missed))),
            switched_off: enough && held_out_used * WORTH < held_out,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(tallies: &[PrefaultTally]) -> PrefaultScore {
        let mut sum = Tallies::default();
        for tally in tallies {
            sum.add(*tally);
        }
        sum.score()
    }

    fn fork(held_out_used: u64, missed: u64) -> PrefaultTally {
        PrefaultTally {
            planned: 16_384,
            held_out: 64,
            held_out_used,
            late: 100,
            missed,
        }
    }

    #[test]
    fn a_working_set_that_all_use_is_precise_and_complete() {
        let score = score(&[fork(64, 0)]);
        assert_eq!((score.precision, score.recall), (Some(1.0), Some(1.0)));
        assert!(!score.switched_off);
    }

    #[test]
    fn a_prefault_that_few_use_is_switched_off_and_one_that_some_use_is_not() {
        assert!(score(&[fork(15, 0)]).switched_off);
        assert!(!score(&[fork(16, 0)]).switched_off);
    }

    #[test]
    fn recall_is_the_part_of_what_was_used_that_was_foreseen() {
        let recall = score(&[fork(32, 8242)]).recall.unwrap();
        assert!((0.49..0.51).contains(&recall), "{recall}");
    }

    #[test]
    fn too_little_is_no_verdict() {
        let few = PrefaultTally {
            held_out: 63,
            ..fork(0, 100)
        };
        assert_eq!(
            score(&[few]),
            PrefaultScore {
                forks: 1,
                ..PrefaultScore::default()
            }
        );
        assert_eq!(score(&[]), PrefaultScore::default());
    }

    #[test]
    fn what_was_long_ago_counts_less_and_less() {
        let mut tallies = vec![fork(64, 0); 100];
        tallies.extend([fork(0, 0); 60]);
        assert!(score(&tallies).switched_off);
    }
}
