use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::Uri;
use serde::{Deserialize, Serialize};

use super::Secret;

/// Who is told of events.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WebhookSettings {
    /// `http://…`, where events are posted to. Empty: they wait in the table `outbox`.
    pub url: String,
    /// Signs them: `whsec_` and the base64 of 24 to 64 bytes, as the Standard Webhooks have it.
    pub secret: Secret,
}

impl WebhookSettings {
    /// Where events go; `None`: nowhere.
    ///
    /// # Errors
    /// What is wrong with the URL.
    pub fn target(&self) -> Result<Option<Uri>, &'static str> {
        if self.url.is_empty() {
            return Ok(None);
        }
        let wrong = "must be a URL such as http://notices.internal:8080/quota";
        let uri: Uri = self.url.parse().map_err(|_| wrong)?;
        if uri.scheme_str() == Some("https") {
            return Err("must begin with http://: for https, name a proxy that speaks it");
        }
        let has_host = uri.host().is_some_and(|host| !host.is_empty());
        let has_user = uri
            .authority()
            .is_some_and(|authority| authority.as_str().contains('@'));
        match uri.scheme_str() {
            Some("http") if has_host && !has_user => Ok(Some(uri)),
            Some("http") if has_user => Err("must hold no user and password"),
            _ => Err(wrong),
        }
    }

    /// The bytes of the secret.
    ///
    /// # Errors
    /// What is wrong with it; never what it is.
    pub fn key(&self) -> Result<Vec<u8>, &'static str> {
        let wrong = "must be whsec_ and the base64 of 24 to 64 bytes: \
             echo whsec_$(openssl rand -base64 32)";
        let text = self.secret.expose();
        let text = text.strip_prefix("whsec_").unwrap_or(text);
        let key = STANDARD.decode(text).map_err(|_| wrong)?;
        if (24..=64).contains(&key.len()) {
            Ok(key)
        } else {
            Err(wrong)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_plain_http_without_credentials() {
        let target = |url: &str| {
            let settings = WebhookSettings {
                url: url.to_owned(),
                ..WebhookSettings::default()
            };
            settings.target()
        };
        assert_eq!(target(""), Ok(None));
        for url in ["http://a", "http://a:81/x?y=z", "http://[::1]:8080/"] {
            assert_eq!(target(url), Ok(Some(url.parse().expect("a URL"))), "{url}");
        }
        for url in [
            "a",
            "/a",
            "a:81",
            "ftp://a",
            "http://",
            "http://u:p@a/",
            "https://a",
            " ",
        ] {
            assert!(target(url).is_err(), "{url}");
        }
    }

    #[test]
    fn a_secret_is_base64_of_enough_bytes() {
        let key = |secret: &str| {
            let settings = WebhookSettings {
                secret: Secret::new(secret),
                ..WebhookSettings::default()
            };
            settings.key()
        };
        let good = STANDARD.encode([7; 24]);
        assert_eq!(key(&good), Ok(vec![7; 24]));
        assert_eq!(key(&format!("whsec_{good}")), Ok(vec![7; 24]));
        for wrong in [
            "",
            "whsec_",
            "whsec_???",
            &STANDARD.encode([7; 23]),
            &STANDARD.encode([7; 65]),
        ] {
            assert!(key(wrong).is_err(), "{wrong}");
        }
    }
}
