//! Names of forks.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The name of a fork: `[a-z0-9][a-z0-9._-]{0,63}`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ForkId(Arc<str>);

/// A text that is not the name of a fork.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{id:?} is not a fork id: up to 64 of a-z, 0-9, '.', '_' and '-', the first a letter or digit")]
pub struct InvalidForkId {
    id: String,
}

impl ForkId {
    /// The name, as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ForkId {
    type Err = InvalidForkId;

    fn from_str(id: &str) -> Result<Self, InvalidForkId> {
        let plain = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let valid = id.len() <= 64
            && id.as_bytes().first().is_some_and(plain)
            && id.bytes().all(|byte| plain(&byte) || b"._-".contains(&byte));
        if valid {
            Ok(Self(id.into()))
        } else {
            Err(InvalidForkId { id: id.to_owned() })
        }
    }
}

impl fmt::Display for ForkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ForkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fork_ids_are_what_the_design_says() {
        for good in ["a", "0", "fork-1", "a.b_c-d", &"x".repeat(64)] {
            assert_eq!(good.parse::<ForkId>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", ".a", "A", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(bad.parse::<ForkId>().is_err(), "{bad}");
        }
    }
}
