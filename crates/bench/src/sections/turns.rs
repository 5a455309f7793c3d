//! Turns, so that a disturbance affects all subjects.

/// Returns all items, starting with another one in each round, so that the order changes.
pub(super) fn in_turn<T: Copy>(items: &[T], round: u32) -> Vec<T> {
    let mut turns = items.to_vec();
    if !turns.is_empty() {
        let from = round as usize % turns.len();
        turns.rotate_left(from);
    }
    turns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_first_in_its_turn() {
        let first: Vec<u8> = (0..4).map(|round| in_turn(&[1, 2, 3], round)[0]).collect();
        assert_eq!(first, [1, 2, 3, 1]);
        assert!(in_turn::<u8>(&[], 1).is_empty());
    }
}
