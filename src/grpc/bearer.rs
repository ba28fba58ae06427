//! Where a call carries its credential.

use http::header::AUTHORIZATION;

use crate::error::{Credential, Error, Fault, Result};

/// The bearer credential of a request (RFC 6750 §2.1).
pub(super) fn bearer(headers: &http::HeaderMap) -> Result<&str> {
    let refused = Error::Refused {
        credential: Credential::Authorization,
        fault: Fault::Invalid,
    };
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let value = values.next().ok_or(Error::CredentialMissing)?;
    // Two credentials: whoever reads the other one would see another caller.
    if values.next().is_some() {
        return Err(refused);
    }
    value.to_str().ok().and_then(credential).ok_or(refused)
}

/// The credential in a value of `authorization`; `None` when it is of another scheme.
pub(super) fn credential(value: &str) -> Option<&str> {
    let (scheme, credential) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(credential)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bearer_credentials_are_read_strictly() {
        let read = |values: &[&str]| {
            let mut headers = http::HeaderMap::new();
            for value in values {
                headers.append(AUTHORIZATION, value.parse().expect("ASCII"));
            }
            bearer(&headers).map(str::to_owned)
        };
        assert_eq!(read(&["Bearer x"]).expect("read"), "x");
        assert_eq!(read(&["bearer x"]).expect("read"), "x");
        assert!(matches!(read(&[]), Err(Error::CredentialMissing)));
        for refused in [
            &["x"][..],
            &["Basic x"],
            &["Bearer"],
            &["Bearer a", "Bearer b"],
        ] {
            assert!(
                matches!(read(refused), Err(Error::Refused { .. })),
                "{refused:?}"
            );
        }
    }
}
