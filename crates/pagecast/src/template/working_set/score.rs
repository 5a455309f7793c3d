//! Scores of the prefaults of a template.

/// The fewest held-out pages that make a score meaningful.
const ENOUGH: u64 = 64;

/// Once this many held-out pages are counted, older counts are halved, so that the score follows the workload.
const MANY: u64 = 1024;

/// If less than one prefaulted page in this many is used, the prefault costs more than it saves. Installing a page
/// ahead takes a fifth to a twentieth of the time of its fault. But the memory of an unused page is lost for
/// good.
const WORTH: u64 = 4;

/// How well the prefault of one fork foresaw its faults, while it was watched. Counts small pages (4 KiB).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefaultTally {
    /// Pages in the working set.
    pub planned: u64,
    /// Planned pages that were held out, to see whether the fork would touch them.
    pub held_out: u64,
    /// Held-out pages that the fork touched.
    pub held_out_used: u64,
    /// Pages to be installed ahead that the fork touched before their turn came.
    pub late: u64,
    /// Touched pages that were not in the working set.
    pub missed: u64,
}

/// How well the prefaults of a template have done lately.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PrefaultScore {
    /// The number of forks in the score.
    pub forks: u64,
    /// The fraction of prefaulted pages that was used, from 0 to 1: the held-out pages are the sample. `None` if too
    /// few pages are counted.
    pub precision: Option<f64>,
    /// The fraction of used pages that had been foreseen, from 0 to 1.
    pub recall: Option<f64>,
    /// Too few prefaulted pages are used: forks get no prefault until there is another working set.
    pub switched_off: bool,
}

/// The sum of tallies.
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
        // Late pages are known to be used. For pages installed in time, the held-out pages give the fraction.
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
