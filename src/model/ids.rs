use std::{fmt, str::FromStr};

use uuid::Uuid;

use super::Violation;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub Uuid);

        impl $name {
            /// Makes a new id: UUID version 7, ordered by time of creation.
            #[expect(clippy::new_without_default, reason = "every call makes another id")]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.as_hyphenated().fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = Violation;

            /// Parses the hyphenated form, 36 characters; any UUID version.
            fn from_str(text: &str) -> Result<Self, Violation> {
                // The parser also knows braced, URN and simple forms; an id has one spelling.
                match Uuid::try_parse(text) {
                    Ok(id) if text.len() == 36 && !id.is_nil() => Ok(Self(id)),
                    _ => Err("must be a UUID such as 01890a5d-ac96-774b-bcce-b302099a8057".into()),
                }
            }
        }
    };
}

id!(
    /// A user.
    UserId
);
id!(
    /// A login session: the family of its refresh tokens.
    SessionId
);
id!(
    /// A program that calls this service.
    ServiceAccountId
);
id!(
    /// One key of a service account.
    ServiceKeyId
);
id!(
    /// A key that a user made for a program.
    ApiKeyId
);
id!(
    /// One enrolment of an authenticator app.
    FactorId
);
id!(
    /// A usage event, named by the client that reports it.
    EventId
);
id!(
    /// Credits granted to a user.
    CreditId
);
id!(
    /// A grant of credits, named by the client that asks for it.
    GrantRequestId
);
id!(
    /// A token that is mailed to somebody.
    OneTimeTokenId
);
id!(
    /// One start of a process that admits from leases.
    ReplicaId
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_one_spelling() {
        let id = UserId::new();
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(id.to_string().to_uppercase().parse(), Ok(id));
        for text in [
            "",
            "x",
            &id.0.simple().to_string(),
            &id.0.braced().to_string(),
        ] {
            assert!(text.parse::<UserId>().is_err(), "{text}");
        }
        assert!(
            "00000000-0000-0000-0000-000000000000"
                .parse::<UserId>()
                .is_err()
        );
    }
}
