use std::str::FromStr;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use super::{Email, OneTimeTokenId, SessionId, UserId, Username, Violation};

/// What whoever holds a mailed token may do, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenPurpose {
    /// Proves the address of the account.
    VerifyEmail,
    /// Proves another address, which takes the place of the account's.
    ChangeEmail,
    /// Sets a password; proves the address too.
    ResetPassword,
}

impl TokenPurpose {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::VerifyEmail => "verify_email",
            Self::ChangeEmail => "change_email",
            Self::ResetPassword => "reset_password",
        }
    }
}

impl FromStr for TokenPurpose {
    type Err = Violation;

    fn from_str(text: &str) -> Result<Self, Violation> {
        let all = [Self::VerifyEmail, Self::ChangeEmail, Self::ResetPassword];
        let known = all.into_iter().find(|purpose| purpose.as_str() == text);
        known.ok_or_else(|| "must be a purpose of a token".into())
    }
}

/// What a mail is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MailKind {
    Verification,
    Reset,
    /// To the new address.
    AddressChange,
    /// To the present address: another one is asked for.
    AddressChangeAsked,
    /// To the address that was.
    AddressChanged,
    PasswordChanged,
    NewLogin,
}

impl MailKind {
    pub const ALL: [Self; 7] = [
        Self::Verification,
        Self::Reset,
        Self::AddressChange,
        Self::AddressChangeAsked,
        Self::AddressChanged,
        Self::PasswordChanged,
        Self::NewLogin,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Verification => "verification",
            Self::Reset => "reset",
            Self::AddressChange => "address_change",
            Self::AddressChangeAsked => "address_change_asked",
            Self::AddressChanged => "address_changed",
            Self::PasswordChanged => "password_changed",
            Self::NewLogin => "new_login",
        }
    }
}

/// A mail to be sent, as it waits in the outbox: whom and what it is about, and no secret. It is composed
/// when it is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MailNote {
    pub kind: MailKind,
    pub user_id: UserId,
    pub token_id: Option<OneTimeTokenId>,
    pub session_id: Option<SessionId>,
    /// Of an address that is the user's no more by the time; else that of the token or the user.
    pub to: Option<Email>,
    /// How often the server may have had it without a word of it.
    pub unanswered: u32,
}

impl MailNote {
    /// The kind of its event.
    pub const KIND: &str = "mail";

    /// About a user alone.
    pub fn new(kind: MailKind, user_id: UserId) -> Self {
        Self {
            kind,
            user_id,
            token_id: None,
            session_id: None,
            to: None,
            unanswered: 0,
        }
    }

    pub fn payload(&self) -> Value {
        let mut payload = json!({
            "mail": self.kind.as_str(),
            "user_id": self.user_id.to_string(),
        });
        let others = [
            ("token_id", self.token_id.map(|id| id.to_string())),
            ("session_id", self.session_id.map(|id| id.to_string())),
            ("to", self.to.as_ref().map(ToString::to_string)),
        ];
        for (name, value) in others {
            if let Some(value) = value {
                payload[name] = value.into();
            }
        }
        if self.unanswered > 0 {
            payload["unanswered"] = self.unanswered.into();
        }
        payload
    }

    /// `None` for a payload that no version of ours wrote, or a later one.
    pub fn read(payload: &Value) -> Option<Self> {
        let kind = payload["mail"].as_str()?;
        let kind = MailKind::ALL.into_iter().find(|one| one.as_str() == kind)?;
        Some(Self {
            kind,
            user_id: payload["user_id"].as_str()?.parse().ok()?,
            token_id: optional(&payload["token_id"])?,
            session_id: optional(&payload["session_id"])?,
            to: optional(&payload["to"])?,
            unanswered: match &payload["unanswered"] {
                Value::Null => 0,
                times => times.as_u64()?.try_into().ok()?,
            },
        })
    }
}

fn optional<T: FromStr>(value: &Value) -> Option<Option<T>> {
    match value {
        Value::Null => Some(None),
        value => value.as_str()?.parse().ok().map(Some),
    }
}

/// What a mail is composed of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MailDetails {
    pub kind: MailKind,
    pub to: Email,
    pub username: Username,
    pub token: Option<MailedToken>,
    /// When what it tells of happened.
    pub at: DateTime<Utc>,
    /// Of a login.
    pub user_agent: String,
    /// Of a login: an IP address.
    pub address: String,
}

/// A token as far as the database knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MailedToken {
    pub id: OneTimeTokenId,
    pub created_at: DateTime<Utc>,
    pub expires_at: DateTime<Utc>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_read_as_it_was_written() {
        for kind in MailKind::ALL {
            let plain = MailNote::new(kind, UserId::new());
            let full = MailNote {
                token_id: Some(OneTimeTokenId::new()),
                session_id: Some(SessionId::new()),
                to: Some("a@example.com".parse().expect("valid")),
                unanswered: 2,
                ..plain.clone()
            };
            for note in [plain, full] {
                assert_eq!(MailNote::read(&note.payload()), Some(note));
            }
        }
    }

    #[test]
    fn what_is_no_note_is_read_as_none() {
        let good = MailNote::new(MailKind::Reset, UserId::new()).payload();
        assert_eq!(MailNote::read(&json!({})), None);
        for (name, value) in [
            ("mail", json!("greeting")),
            ("user_id", json!(7)),
            ("token_id", json!("")),
            ("to", json!("nobody")),
            ("unanswered", json!(-1)),
        ] {
            let mut wrong = good.clone();
            wrong[name] = value;
            assert_eq!(MailNote::read(&wrong), None, "{name}");
        }
    }
}
