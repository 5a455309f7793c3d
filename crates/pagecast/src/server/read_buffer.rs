//! A buffer for bytes that have to be read.

/// Room for bytes that have to be read. Grows to the longest read, and stays as long.
#[derive(Debug, Default)]
pub(super) struct ReadBuffer(Vec<u8>);

impl ReadBuffer {
    pub(super) const fn new() -> Self {
        Self(Vec::new())
    }

    /// Creates a buffer that does not grow for reads of up to `length` bytes.
    pub(super) fn with_len(length: usize) -> Self {
        Self(vec![0; length])
    }

    /// The first `length` bytes.
    pub(super) fn first(&mut self, length: usize) -> &mut [u8] {
        if self.0.len() < length {
            self.0.resize(length, 0);
        }
        self.0.get_mut(..length).unwrap_or_default()
    }
}
