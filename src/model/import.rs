//! Users who come from another system.

use std::str::FromStr;

use chrono::{DateTime, Utc};
use uuid::{Builder, Uuid};

use super::{Email, Person, Role, TierName, UserId, Violation};

/// The system that imported users come from: 1 to 64 of `a-z A-Z 0-9 _ . -`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportSource(String);

impl ImportSource {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ImportSource {
    type Err = Violation;

    fn from_str(text: &str) -> Result<Self, Violation> {
        let is_fine = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
        if (1..=64).contains(&text.len()) && text.bytes().all(is_fine) {
            Ok(Self(text.to_owned()))
        } else {
            Err("must be 1 to 64 of a-z A-Z 0-9 _ . -".into())
        }
    }
}

/// A user to import, checked but for whether there is such a one.
///
/// Not `Debug`, as nothing that holds a hash.
#[derive(Clone)]
pub struct ImportUser {
    pub key: ImportKey,
    pub person: Person,
    pub password_hash: Option<String>,
    pub role: Role,
    pub tier: TierName,
    pub is_active: bool,
    pub email_verified_at: Option<DateTime<Utc>>,
    /// `None`: when it is imported.
    pub created_at: Option<DateTime<Utc>>,
    pub last_login_at: Option<DateTime<Utc>>,
}

/// By what an imported user is known when imported again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImportKey {
    /// An id that came along.
    Given(UserId),
    /// One made from where the user comes from.
    Derived(UserId),
}

/// All of a UUID of version 7 but its time.
const NOT_TIME: u128 = (1 << 80) - 1;

impl ImportKey {
    /// Makes an id from a digest over source and address, in 74 of its bits. Of version 7, so that it
    /// stands among the others by when the account was made.
    pub fn derive(digest: [u8; 10], created_at: Option<DateTime<Utc>>) -> Self {
        let millis = created_at.map_or(0, |at| at.timestamp_millis().max(0));
        let builder = Builder::from_unix_timestamp_millis(millis.unsigned_abs(), &digest);
        Self::Derived(UserId(builder.into_uuid()))
    }

    pub fn id(self) -> UserId {
        match self {
            Self::Given(id) | Self::Derived(id) => id,
        }
    }

    pub fn is_derived(self) -> bool {
        matches!(self, Self::Derived(_))
    }

    /// Whether a user was imported under this key. One that was derived may have been so while the row
    /// said another time.
    pub fn is_of(self, id: Uuid) -> bool {
        match self {
            Self::Given(given) => given.0 == id,
            Self::Derived(UserId(derived)) => {
                id.get_version_num() == 7 && (derived.as_u128() ^ id.as_u128()) & NOT_TIME == 0
            }
        }
    }
}

impl ImportSource {
    /// What a user of this source is known by who has no id.
    pub fn name_of(&self, email: &Email) -> String {
        format!("{}\n{}", self.0, email.as_str().to_ascii_lowercase())
    }
}

/// What there is already of what a row would bring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImportStanding {
    /// A user has the row's id.
    pub has_id: bool,
    /// Who has the e-mail address, and who the username.
    pub email: Option<Uuid>,
    pub username: Option<Uuid>,
    /// A user with the id was deleted, and the deletion is remembered.
    pub is_erased: bool,
}

/// What is to become of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImportStep {
    Insert,
    /// Imported before; left as it is.
    Leave,
    /// Others have the address, the username or both.
    Taken {
        email: bool,
        username: bool,
    },
    /// Somebody has the id whom the row does not name.
    Conflict,
    Erased,
}

impl ImportStanding {
    /// Decides what becomes of a row with this key.
    pub fn decide(&self, key: ImportKey) -> ImportStep {
        let is_same = |id: Option<Uuid>| id.is_some_and(|id| key.is_of(id));
        if is_same(self.email) || (self.has_id && is_same(self.username)) {
            return ImportStep::Leave;
        }
        if self.has_id {
            return ImportStep::Conflict;
        }
        if self.is_erased {
            return ImportStep::Erased;
        }
        match (self.email.is_some(), self.username.is_some()) {
            (false, false) => ImportStep::Insert,
            (email, username) => ImportStep::Taken { email, username },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(secs: i64) -> Option<DateTime<Utc>> {
        DateTime::from_timestamp(secs, 0)
    }

    #[test]
    fn a_derived_id_is_of_version_7_and_known_whatever_time_the_row_says() {
        let key = ImportKey::derive([0xff; 10], at(1_700_000_000));
        let id = key.id().0;
        assert_eq!(id.get_version_num(), 7);
        let (secs, _) = id.get_timestamp().expect("right").to_unix();
        assert_eq!(secs, 1_700_000_000);
        for other in [None, at(1), at(-5)] {
            assert!(ImportKey::derive([0xff; 10], other).is_of(id));
            assert!(!ImportKey::derive([0xfe; 10], other).is_of(id));
        }
        assert!(!ImportKey::Given(UserId::new()).is_of(id));
        assert!(ImportKey::Given(UserId(id)).is_of(id));
    }

    #[test]
    fn what_is_there_decides_what_becomes_of_a_row() {
        let mine = ImportKey::Given(UserId::new());
        let (me, other) = (Some(mine.id().0), Some(Uuid::now_v7()));
        let decide = |has_id, email, username, is_erased| {
            let standing = ImportStanding {
                has_id,
                email,
                username,
                is_erased,
            };
            standing.decide(mine)
        };
        let taken = |email, username| ImportStep::Taken { email, username };
        for (decided, expected) in [
            (decide(false, None, None, false), ImportStep::Insert),
            (decide(true, me, me, false), ImportStep::Leave),
            // Either was changed since.
            (decide(true, me, other, false), ImportStep::Leave),
            (decide(true, None, me, false), ImportStep::Leave),
            // Both were, or the id is somebody else's.
            (decide(true, None, None, false), ImportStep::Conflict),
            (decide(true, other, other, false), ImportStep::Conflict),
            (decide(false, other, None, false), taken(true, false)),
            (decide(false, None, other, false), taken(false, true)),
            (decide(false, other, other, false), taken(true, true)),
            (decide(false, None, None, true), ImportStep::Erased),
        ] {
            assert_eq!(decided, expected);
        }
    }
}
