//! Posting events to whoever wants to know, signed as the Standard Webhooks have it
//! (`webhook-id`, `webhook-timestamp`, `webhook-signature`).

use std::time::Duration;

use aws_lc_rs::hmac;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use chrono::{DateTime, Utc};
use http::{
    Request, Uri,
    header::{CONTENT_TYPE, HOST, USER_AGENT},
};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, task::JoinSet, time::timeout};
use uuid::Uuid;

use crate::config::WebhookSettings;

/// Longest that an attempt may take.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// Where events go, and the key that signs them.
pub struct Webhook {
    target: Uri,
    key: hmac::Key,
}

/// Why an event is not delivered. Holds nothing of the address or of what was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Undelivered {
    #[error("no connection")]
    Unreachable,
    #[error("no answer within {} seconds", DEADLINE.as_secs())]
    Silent,
    #[error("the connection broke")]
    Broken,
    #[error("answered {0}")]
    Refused(u16),
}

impl Webhook {
    /// `None` when nobody is to be told.
    ///
    /// # Errors
    /// What is wrong with the settings.
    pub fn new(settings: &WebhookSettings) -> Result<Option<Self>, &'static str> {
        let Some(target) = settings.target()? else {
            return Ok(None);
        };
        let key = hmac::Key::new(hmac::HMAC_SHA256, &settings.key()?);
        Ok(Some(Self { target, key }))
    }

    /// Posts an event once. Whoever receives it knows it again by its id.
    ///
    /// # Errors
    /// Whatever is not an answer of success, a redirection too.
    pub async fn post(
        &self,
        id: Uuid,
        body: String,
        now: DateTime<Utc>,
    ) -> Result<(), Undelivered> {
        let posted = timeout(DEADLINE, self.exchange(id, body, now)).await;
        let status = posted.unwrap_or(Err(Undelivered::Silent))?;
        if (200..300).contains(&status) {
            Ok(())
        } else {
            Err(Undelivered::Refused(status))
        }
    }

    async fn exchange(
        &self,
        id: Uuid,
        body: String,
        now: DateTime<Utc>,
    ) -> Result<u16, Undelivered> {
        let target = &self.target;
        let (host, port) = (target.host().unwrap_or_default(), target.port_u16());
        let address = format!("{host}:{}", port.unwrap_or(80));
        let stream = TcpStream::connect(address).await;
        let stream = stream.map_err(|_| Undelivered::Unreachable)?;
        let handshake = http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|_| Undelivered::Broken)?;
        // The set ends the connection with the attempt: nobody reads the rest of the answer.
        let mut driver = JoinSet::new();
        driver.spawn(connection);
        let (id, timestamp) = (id.to_string(), now.timestamp());
        let path = target.path_and_query().map_or("/", |path| path.as_str());
        let request = Request::post(path)
            .header(HOST, target.authority().map_or(host, |one| one.as_str()))
            .header(CONTENT_TYPE, "application/json")
            .header(
                USER_AGENT,
                concat!("tollkeeper/", env!("CARGO_PKG_VERSION")),
            )
            .header("webhook-id", &id)
            .header("webhook-timestamp", timestamp)
            .header("webhook-signature", self.signature(&id, timestamp, &body))
            .body(body)
            .map_err(|_| Undelivered::Broken)?;
        let answer = sender.send_request(request).await;
        let answer = answer.map_err(|_| Undelivered::Broken)?;
        Ok(answer.status().as_u16())
    }

    fn signature(&self, id: &str, timestamp: i64, body: &str) -> String {
        let signed = format!("{id}.{timestamp}.{body}");
        let tag = hmac::sign(&self.key, signed.as_bytes());
        format!("v1,{}", STANDARD.encode(tag))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Secret;

    #[test]
    fn a_signature_is_what_openssl_makes_of_the_same() {
        // printf '%s' "$ID.$TIMESTAMP.$BODY" | openssl dgst -sha256 -mac HMAC -macopt hexkey:… -binary
        let settings = WebhookSettings {
            url: "http://localhost".to_owned(),
            secret: Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"),
        };
        let webhook = Webhook::new(&settings).expect("valid").expect("there");
        let id = "msg_p5jXN8AQM9LWM0D4loKWxJek";
        let signature = webhook.signature(id, 1_614_265_330, r#"{"test": 2432232314}"#);
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }
}
