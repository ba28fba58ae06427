//! Users of another system, with the hashes of their passwords: each row is imported, was before, or
//! is refused for itself.
//!
//! Nothing is kept of an import. A row is known by its id, or by one made of where it comes from and its
//! address, so any part of an import may be repeated, on any replica, whatever became of it.

use std::{
    collections::HashSet,
    hash::{BuildHasher as _, RandomState},
};

use aws_lc_rs::hmac;
use chrono::{DateTime, TimeDelta, Utc};

use super::{Auth, ImportedHash};
use crate::{
    error::{Error, FieldViolation, Result, Violations},
    model::{
        Email, ImportKey, ImportSource, ImportStep, ImportUser, Origin, Person, Role, Tiers,
        UserId, Violation,
    },
    store::Store,
};

/// How often a batch is tried: with others that write the same names it may have met in a deadlock.
const TRIES: u32 = 3;

/// Clocks differ.
const AHEAD: TimeDelta = TimeDelta::minutes(5);

/// How an import is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportOptions {
    pub source: ImportSource,
    /// Checks only.
    pub dry_run: bool,
    /// Whether rows may make administrators.
    pub allow_admins: bool,
}

/// A row as it was sent: text is not looked at yet, other values are read or said to be wrong. Empty
/// texts are values that are not there.
pub struct ImportRow {
    /// By what the caller knows it.
    pub row: i64,
    pub user_id: String,
    pub email: String,
    pub username: String,
    pub full_name: String,
    pub password_hash: String,
    pub tier: String,
    pub role: Result<Role, Violation>,
    pub is_active: Result<bool, Violation>,
    pub email_verified_at: Result<Option<DateTime<Utc>>, Violation>,
    pub created_at: Result<Option<DateTime<Utc>>, Violation>,
    pub last_login_at: Result<Option<DateTime<Utc>>, Violation>,
}

/// What became of a row.
#[derive(Debug, PartialEq, Eq)]
pub enum Imported {
    /// Durable, unless it was a dry run.
    Now,
    Before,
    Refused(RowFault),
}

/// Why a row was refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowFault {
    #[error("{0}")]
    Invalid(Violations),
    /// Names the fields that somebody else has.
    #[error("another account has the e-mail address or the username")]
    Taken(Vec<&'static str>),
    /// Names the fields that an earlier row has.
    #[error("an earlier row has the same id, e-mail address or username")]
    Duplicate(Vec<&'static str>),
    #[error("the user with this id has another e-mail address and another username")]
    Conflict,
    #[error("the user was deleted")]
    Erased,
}

impl RowFault {
    /// The fields at fault, and what is wrong with each.
    pub fn fields(self) -> Vec<FieldViolation> {
        let each = |fields: Vec<&str>, description: &'static str| {
            let violation = |field: &str| FieldViolation {
                field: field.to_owned(),
                description: description.into(),
            };
            fields.into_iter().map(violation).collect()
        };
        match self {
            Self::Invalid(Violations(violations)) => violations,
            Self::Taken(fields) => each(fields, "is that of another account"),
            Self::Duplicate(fields) => each(fields, "is that of an earlier row"),
            Self::Conflict => each(vec!["user_id"], "is that of another user"),
            Self::Erased => Vec::new(),
        }
    }
}

impl From<ImportStep> for Imported {
    fn from(step: ImportStep) -> Self {
        Self::Refused(match step {
            ImportStep::Insert => return Self::Now,
            ImportStep::Leave => return Self::Before,
            ImportStep::Taken { email, username } => {
                let taken = [(email, "email"), (username, "username")].into_iter();
                let taken = taken.filter(|(is_taken, _)| *is_taken);
                RowFault::Taken(taken.map(|(_, name)| name).collect())
            }
            ImportStep::Conflict => RowFault::Conflict,
            ImportStep::Erased => RowFault::Erased,
        })
    }
}

/// An import under way.
pub struct Import {
    store: Store,
    /// An id is shown to people who must not learn the address by trying which makes it.
    ids: hmac::Key,
    options: ImportOptions,
    origin: Origin,
    /// What rows have brought so far, hashed: a few bytes for each id, address and username.
    seen: HashSet<u64>,
    hasher: RandomState,
}

impl Auth {
    /// Begins an import.
    pub fn import(&self, options: ImportOptions, origin: Origin) -> Import {
        Import {
            store: self.store.clone(),
            ids: self.import_ids.clone(),
            options,
            origin,
            seen: HashSet::new(),
            hasher: RandomState::new(),
        }
    }
}

/// A row that is right by itself.
struct Checked {
    user: ImportUser,
    /// Its names and what they are called, hashed.
    names: Vec<(&'static str, u64)>,
}

impl Import {
    pub fn options(&self) -> &ImportOptions {
        &self.options
    }

    /// Imports rows in one transaction; says what became of each, in their order. All that were
    /// imported are durable when it returns.
    ///
    /// # Errors
    /// `Unavailable`: perhaps all were imported, perhaps none; it is safe to repeat
    pub async fn take(
        &mut self,
        rows: &[ImportRow],
        tiers: &Tiers,
        now: DateTime<Utc>,
    ) -> Result<Vec<Imported>> {
        let checked: Vec<Result<Checked, Violations>> =
            rows.iter().map(|row| self.check(row, tiers, now)).collect();
        let right: Vec<&Checked> = checked.iter().flatten().collect();
        let mut tries = 1;
        let (outcomes, seen) = loop {
            match self.settle(&right).await {
                Err(Error::Unavailable(_)) if tries < TRIES => tries += 1,
                settled => break settled?,
            }
        };
        self.seen.extend(seen);
        let mut outcomes = outcomes.into_iter();
        let outcome = |row| match row {
            Ok(_) => outcomes
                .next()
                .ok_or_else(|| Error::internal("a row was left out")),
            Err(violations) => Ok(Imported::Refused(RowFault::Invalid(violations))),
        };
        checked.into_iter().map(outcome).collect()
    }

    /// Decides about rows that are right by themselves and inserts those that are new; also answers
    /// the names that they have taken or had already.
    async fn settle(&self, rows: &[&Checked]) -> Result<(Vec<Imported>, HashSet<u64>)> {
        let mut outcomes: Vec<Imported> = rows.iter().map(|_| Imported::Now).collect();
        // By rows that may yet be overtaken too.
        let mut seen: HashSet<u64> = HashSet::new();
        let mut open: Vec<usize> = (0..rows.len()).collect();
        for round in 0..TRIES {
            if open.is_empty() {
                break;
            }
            let users: Vec<&ImportUser> = open.iter().map(|&index| &rows[index].user).collect();
            let standings = self.store.user_import_look(&users).await?;
            for (&index, standing) in open.iter().zip(standings) {
                let Checked { user, names } = rows[index];
                let is_seen = |hash| self.seen.contains(hash) || seen.contains(hash);
                let again = names.iter().filter(|(_, hash)| is_seen(hash));
                let mut again: Vec<_> = again.map(|(name, _)| *name).collect();
                if user.key.is_derived() && again.len() > 1 {
                    // The row did not say it.
                    again.retain(|name| *name != "user_id");
                }
                // What comes by again has met its own names.
                outcomes[index] = match again.is_empty() || round > 0 {
                    true => standing.decide(user.key).into(),
                    false => Imported::Refused(RowFault::Duplicate(again)),
                };
                if matches!(outcomes[index], Imported::Now | Imported::Before) {
                    seen.extend(names.iter().map(|(_, hash)| hash));
                }
            }
            open.retain(|&index| outcomes[index] == Imported::Now);
            if open.is_empty() || self.options.dry_run {
                open.clear();
                break;
            }
            let new: Vec<&ImportUser> = open.iter().map(|&index| &rows[index].user).collect();
            let source = &self.options.source;
            let inserted = self.store.user_import(&new, source, &self.origin).await?;
            // Whom the insert has passed over has been overtaken, and is looked at again.
            open.retain(|&index| !inserted.contains(&rows[index].user.key.id()));
        }
        if !open.is_empty() {
            // Names come and go as fast as we look.
            return Err(Error::Unavailable("rows were overtaken".into()));
        }
        let there = rows.iter().zip(&outcomes);
        let there = there.filter(|(_, outcome)| !matches!(outcome, Imported::Refused(_)));
        let names = there.flat_map(|(row, _)| row.names.iter().map(|(_, hash)| *hash));
        let names = names.collect();
        Ok((outcomes, names))
    }

    /// Checks what can be said of a row alone, by the rules for users who are created.
    fn check(
        &self,
        row: &ImportRow,
        tiers: &Tiers,
        now: DateTime<Utc>,
    ) -> Result<Checked, Violations> {
        let mut wrong = Wrong(Vec::new());
        let is_given = !row.user_id.is_empty();
        let id = match is_given {
            true => wrong.take("user_id", row.user_id.parse().map(Some)),
            false => Some(None),
        };
        let email = wrong.take("email", row.email.parse());
        let username = wrong.take("username", row.username.parse());
        let full_name = wrong.take("full_name", row.full_name.parse());
        let password_hash = match &*row.password_hash {
            "" => Some(None),
            hash => {
                let hash = hash.parse().map(ImportedHash::into_string);
                wrong.take("password_hash", hash.map(Some))
            }
        };
        let tier = wrong.take("tier", tiers.named_or_default(&row.tier));
        let role = match row.role.clone() {
            Ok(Role::Admin) if !self.options.allow_admins => {
                Err("must not be admin: this import may not make administrators".into())
            }
            role => role,
        };
        let role = wrong.take("role", role);
        let is_active = wrong.take("is_active", row.is_active.clone());
        let mut past = |field, time: &Result<Option<DateTime<Utc>>, Violation>| {
            let time = time.clone().and_then(|time| match time {
                Some(time) if time > now + AHEAD => Err("must not be ahead of now".into()),
                time => Ok(time),
            });
            wrong.take(field, time)
        };
        let email_verified_at = past("email_verified_at", &row.email_verified_at);
        let created_at = past("created_at", &row.created_at);
        let last_login_at = past("last_login_at", &row.last_login_at);
        let all = || {
            let (email, created_at) = (email?, created_at?);
            Some(ImportUser {
                key: self.key(id?, &email, created_at),
                person: Person {
                    email,
                    username: username?,
                    full_name: full_name?,
                },
                password_hash: password_hash?,
                role: role?,
                tier: tier?,
                is_active: is_active?,
                email_verified_at: email_verified_at?,
                created_at,
                last_login_at: last_login_at?,
            })
        };
        match all() {
            Some(user) if wrong.0.is_empty() => Ok(Checked {
                names: self.names(&user),
                user,
            }),
            _ => Err(Violations(wrong.0)),
        }
    }

    fn key(
        &self,
        id: Option<UserId>,
        email: &Email,
        created_at: Option<DateTime<Utc>>,
    ) -> ImportKey {
        match id {
            Some(id) => ImportKey::Given(id),
            None => {
                let name = self.options.source.name_of(email);
                let digest = hmac::sign(&self.ids, name.as_bytes());
                let mut bits = [0; 10];
                bits.copy_from_slice(&digest.as_ref()[..10]);
                ImportKey::derive(bits, created_at)
            }
        }
    }

    fn names(&self, user: &ImportUser) -> Vec<(&'static str, u64)> {
        let hash = |name, value: &str| {
            let hash = self.hasher.hash_one((name, value.to_ascii_lowercase()));
            (name, hash)
        };
        vec![
            hash("user_id", &user.key.id().to_string()),
            hash("email", user.person.email.as_str()),
            hash("username", user.person.username.as_str()),
        ]
    }
}

/// What is wrong with the fields of a row.
struct Wrong(Vec<FieldViolation>);

impl Wrong {
    fn take<T>(&mut self, field: &str, value: Result<T, Violation>) -> Option<T> {
        let note = |description| {
            self.0.push(FieldViolation {
                field: field.to_owned(),
                description,
            });
        };
        value.map_err(note).ok()
    }
}
