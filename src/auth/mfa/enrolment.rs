//! How a secret gets into an authenticator app: a URI, and a picture of it.

use qrcode::{Color, EcLevel, QrCode};

use super::totp::{STEP_SECS, TotpSecret};
use crate::{
    error::{Error, Result},
    model::{TotpCode, Username},
};

/// What an app needs, shown once. Not `Debug`.
pub struct Enrolment {
    /// base 32, to be typed in.
    pub secret: String,
    pub uri: String,
    /// The URI as an SVG document.
    pub qr_code: String,
}

/// Modules of white around the code (ISO/IEC 18004 §5.3.8).
const QUIET_ZONE: usize = 4;

impl Enrolment {
    /// # Errors
    /// `Internal` when the URI fits into no QR code.
    pub(super) fn new(secret: &TotpSecret, issuer: &str, user: &Username) -> Result<Self> {
        let secret = secret.base32();
        let uri = uri(&secret, issuer, user.as_str());
        Ok(Self {
            qr_code: svg(&uri)?,
            secret,
            uri,
        })
    }
}

/// Key Uri Format, as the first of the apps wrote it down and all others read it.
fn uri(secret: &str, issuer: &str, account: &str) -> String {
    let (issuer, account) = (percent_encoded(issuer), percent_encoded(account));
    let digits = TotpCode::DIGITS;
    format!(
        "otpauth://totp/{issuer}:{account}?secret={secret}&issuer={issuer}&algorithm=SHA1\
         &digits={digits}&period={STEP_SECS}"
    )
}

/// All but what RFC 3986 §2.3 leaves as it is: apps do not agree on `+`.
fn percent_encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// One path of all dark modules, a run at a time.
fn svg(text: &str) -> Result<String> {
    let code = QrCode::with_error_correction_level(text, EcLevel::M).map_err(Error::internal)?;
    let (width, colors) = (code.width(), code.to_colors());
    let mut path = String::new();
    for (y, row) in colors.chunks(width).enumerate() {
        let mut x = 0;
        while x < width {
            let run = row[x..]
                .iter()
                .take_while(|color| **color == row[x])
                .count();
            if row[x] == Color::Dark {
                let (left, top) = (x + QUIET_ZONE, y + QUIET_ZONE);
                path.push_str(&format!("M{left} {top}h{run}v1h-{run}z"));
            }
            x += run;
        }
    }
    let side = width + 2 * QUIET_ZONE;
    Ok(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {side} {side}\" \
         shape-rendering=\"crispEdges\"><path fill=\"#fff\" d=\"M0 0h{side}v{side}H0z\"/>\
         <path fill=\"#000\" d=\"{path}\"/></svg>"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uri_holds_whatever_the_issuer_is_called() {
        assert_eq!(
            uri("ABC", "Acme & Söhne", "ada.l-1_x"),
            "otpauth://totp/Acme%20%26%20S%C3%B6hne:ada.l-1_x?secret=ABC\
             &issuer=Acme%20%26%20S%C3%B6hne&algorithm=SHA1&digits=6&period=30"
        );
    }

    #[test]
    fn the_longest_names_fit_into_a_code() {
        let secret = TotpSecret([0; 20]);
        let username = "x".repeat(32).parse().expect("valid");
        let issuer = "ß".repeat(64);
        Enrolment::new(&secret, &issuer, &username).expect("fits");
    }
}
