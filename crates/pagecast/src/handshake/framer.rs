//! The end of a JSON message in a stream.

use super::MAX_MESSAGE_BYTES;

/// Collects the pieces of a message until its outermost bracket closes.
///
/// Firecracker neither ends its message nor closes the socket, so only the JSON itself has an end. Each byte is looked
/// at once, for pieces of any size.
#[derive(Debug, Default)]
pub struct Framer {
    bytes: Vec<u8>,
    /// Number of open brackets of either kind. The parser checks that they match.
    depth: usize,
    in_string: bool,
    escaped: bool,
    complete: bool,
}

/// Why a stream has no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// Longer than [`MAX_MESSAGE_BYTES`].
    #[error("the handshake is longer than {MAX_MESSAGE_BYTES} bytes")]
    TooLong,
    /// It does not begin with a bracket.
    #[error("the handshake is neither a JSON array nor an object: it begins with byte {first:#04x}")]
    NoBracket {
        /// The first byte that is not white space.
        first: u8,
    },
    /// There are bytes after the closing bracket.
    #[error("there are bytes after the handshake message")]
    Trailing,
}

impl Framer {
    /// Adds the next piece. Returns `true` once the message is complete.
    ///
    /// # Errors
    ///
    /// [`FrameError`] as soon as no continuation could make it a message.
    pub fn push(&mut self, piece: &[u8]) -> Result<bool, FrameError> {
        if self.bytes.len().saturating_add(piece.len()) > MAX_MESSAGE_BYTES {
            return Err(FrameError::TooLong);
        }
        for &byte in piece {
            self.step(byte)?;
        }
        self.bytes.extend_from_slice(piece);
        Ok(self.complete)
    }

    /// Returns the bytes so far.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn step(&mut self, byte: u8) -> Result<(), FrameError> {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return Ok(());
        }
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' => {}
            _ if self.complete => return Err(FrameError::Trailing),
            b'[' | b'{' => self.depth += 1,
            _ if self.depth == 0 => return Err(FrameError::NoBracket { first: byte }),
            b']' | b'}' => {
                self.depth -= 1;
                self.complete = self.depth == 0;
            }
            b'"' => self.in_string = true,
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn brackets_and_quotes_in_strings_do_not_count() {
        let mut framer = Framer::default();
        assert_eq!(framer.push(br#"[{"a":"]}\"]"}"#), Ok(false));
        assert_eq!(framer.push(b"]\n"), Ok(true));
    }

    #[test]
    fn what_is_no_message_is_refused_at_once() {
        assert_eq!(
            Framer::default().push(b"  GET /"),
            Err(FrameError::NoBracket { first: b'G' })
        );
        assert_eq!(Framer::default().push(b"[] x"), Err(FrameError::Trailing));
        assert_eq!(Framer::default().push(b"]"), Err(FrameError::NoBracket { first: b']' }));
    }

    #[test]
    fn an_endless_message_is_refused_at_the_bound() {
        let mut framer = Framer::default();
        let piece = [b'['; 4096];
        for _ in 0..MAX_MESSAGE_BYTES / piece.len() {
            assert_eq!(framer.push(&piece), Ok(false));
        }
        assert_eq!(framer.push(&piece), Err(FrameError::TooLong));
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(bytes in proptest::collection::vec(prop_oneof![Just(b'['), Just(b']'), Just(b'"'), Just(b'\\'), any::<u8>()], 0..200),
                                cuts in proptest::collection::vec(0..200usize, 0..8)) {
            let mut whole = Framer::default();
            let expected = whole.push(&bytes);
            let mut pieces = Framer::default();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let mut last = Ok(false);
            for pair in cuts.windows(2) {
                last = pieces.push(&bytes[pair[0]..pair[1]]);
                if last.is_err() { break; }
            }
            prop_assert_eq!(last, expected);
        }

        #[test]
        fn any_json_array_or_object_is_framed_exactly(value in json()) {
            let text = serde_json::to_vec(&value).unwrap();
            let mut framer = Framer::default();
            if let Some((end, start)) = text.split_last() {
                prop_assert_eq!(framer.push(start), Ok(false));
                prop_assert_eq!(framer.push(&[*end]), Ok(true));
            }
        }
    }

    fn json() -> impl Strategy<Value = serde_json::Value> {
        use serde_json::Value;
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<u64>().prop_map(Value::from),
            ".*".prop_map(Value::from)
        ];
        let nested = leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::vec((".*", inner), 0..4)
                    .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
            ]
        });
        proptest::collection::vec(nested, 0..4).prop_map(Value::from)
    }
}
