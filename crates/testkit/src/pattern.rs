//! Bytes that depend on their position.

/// The size of a word of a pattern, in bytes.
pub const WORD_SIZE: usize = 8;

/// Gives every aligned 8-byte word of a memory image a value that depends on its offset.
///
/// So a page from the wrong offset, of another template or full of zeros is noticed. Words of templates are odd; words
/// written by guests are even and never zero. So neither is taken for the other, nor for memory that was never filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    key: u64,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Template,
    Written,
}

/// A word with wrong content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrongWord {
    /// Its offset in the image, in bytes.
    pub offset: u64,
    /// The expected word.
    pub expected: u64,
    /// The actual word.
    pub found: u64,
}

impl Pattern {
    /// The pattern of the template with this seed.
    pub const fn of_template(seed: u64) -> Self {
        Self {
            key: mix(seed),
            kind: Kind::Template,
        }
    }

    /// The pattern that a guest of the template with this seed writes with this `generation`.
    pub const fn of_writes(seed: u64, generation: u32) -> Self {
        Self {
            key: mix(mix(seed) ^ generation as u64),
            kind: Kind::Written,
        }
    }

    /// The word at `offset` bytes from the start of the image, a multiple of [`WORD_SIZE`]. Never zero.
    pub const fn word(self, offset: u64) -> u64 {
        // One multiplication, as every byte of many mebibytes goes through here. The key is mixed well, so that no two
        // seeds give the same words at shifted offsets.
        let product = (offset ^ self.key).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let word = product ^ (product >> 32);
        match self.kind {
            Kind::Template => word | 1,
            Kind::Written => (word | 2) & !1,
        }
    }

    /// Fills `page` with the words from `offset` on. Both are multiples of [`WORD_SIZE`].
    pub fn fill(self, offset: u64, page: &mut [u8]) {
        let (words, _) = page.as_chunks_mut::<WORD_SIZE>();
        for (word, offset) in words.iter_mut().zip((offset..).step_by(WORD_SIZE)) {
            *word = self.word(offset).to_ne_bytes();
        }
    }

    /// Returns the first word of `page`, at `offset`, that is not of this pattern.
    pub fn first_wrong_word(self, offset: u64, page: &[u8]) -> Option<WrongWord> {
        first_wrong_word(offset, page, |offset| self.word(offset))
    }
}

/// Returns the first word of `page`, at `offset`, that differs from `expected` for its offset.
pub(crate) fn first_wrong_word(offset: u64, page: &[u8], expected: impl Fn(u64) -> u64) -> Option<WrongWord> {
    let (words, _) = page.as_chunks::<WORD_SIZE>();
    words
        .iter()
        .zip((offset..).step_by(WORD_SIZE))
        .map(|(word, offset)| WrongWord {
            offset,
            expected: expected(offset),
            found: u64::from_ne_bytes(*word),
        })
        .find(|word| word.expected != word.found)
}

/// The finaliser of `SplitMix64`: every bit of the input changes half of the output.
const fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn pages_of_other_offsets_seeds_and_generations_share_no_word() {
        let patterns = [
            Pattern::of_template(0),
            Pattern::of_template(1),
            Pattern::of_template(4096),
            Pattern::of_writes(0, 1),
            Pattern::of_writes(0, 2),
            Pattern::of_writes(1, 1),
        ];
        let offsets = (0..64 * 4096).step_by(WORD_SIZE);
        let words: HashSet<u64> = patterns
            .iter()
            .flat_map(|pattern| offsets.clone().map(|offset| pattern.word(offset)))
            .collect();
        assert_eq!(words.len(), patterns.len() * offsets.count());
        assert!(!words.contains(&0));
    }

    #[test]
    fn the_first_wrong_word_is_found() {
        let pattern = Pattern::of_template(7);
        let mut page = vec![0; 4096];
        pattern.fill(8192, &mut page);
        assert_eq!(pattern.first_wrong_word(8192, &page), None);
        page[801] ^= 1;
        let wrong = pattern.first_wrong_word(8192, &page).unwrap();
        assert_eq!((wrong.offset, wrong.expected ^ wrong.found), (8192 + 800, 1 << 8));
        assert!(
            pattern.first_wrong_word(4096, &page).is_some(),
            "a page of another offset"
        );
    }
}
