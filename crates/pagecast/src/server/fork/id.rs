//! Names of forks.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

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

impl Serialize for ForkId {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for ForkId {
    /// Deserializes from text, under the same rule as [`FromStr`].
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let id = String::deserialize(from)?;
        id.parse().map_err(serde::de::Error::custom)
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

    #[test]
    fn a_fork_id_in_json_is_held_to_the_same_rule_and_says_so() {
        let id: ForkId = serde_json::from_str(r#""fork-1""#).unwrap();
        assert_eq!(id.as_str(), "fork-1");
        assert_eq!(serde_json::to_string(&id).unwrap(), r#""fork-1""#);
        let refused = serde_json::from_str::<ForkId>(r#""A/b""#).unwrap_err().to_string();
        let expected = "A/b".parse::<ForkId>().unwrap_err().to_string();
        assert!(refused.starts_with(&expected), "{refused}");
        assert!(serde_json::from_str::<ForkId>("7").is_err());
    }
}
