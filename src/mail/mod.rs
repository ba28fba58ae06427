//! Mails: what they say, and how they leave. Knows neither the database nor who is to be told.

mod smtp;
mod templates;

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use chrono::{DateTime, Utc};
use lettre::{
    Address, Message,
    message::{Mailbox, MultiPart},
};
use tracing::info;
use uuid::Uuid;

use crate::{
    config::MailSettings,
    model::{Email, MailDetails},
};
use smtp::Smtp;
use templates::Templates;

/// What cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum MailError {
    #[error("setting {key}: {message}")]
    Setting { key: &'static str, message: String },
    #[error("cannot read the template {path} (setting mail.templates)")]
    Read { path: PathBuf, source: io::Error },
    #[error("the template {path} (setting mail.templates) {message}")]
    Template { path: PathBuf, message: String },
}

/// Why a mail has not gone. Holds nothing of the address or of what the server said beside its code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsent {
    #[error("no connection")]
    Unreachable,
    #[error("no TLS with a certificate that is trusted")]
    Insecure,
    #[error("not done in time")]
    Silent,
    #[error("the connection broke")]
    Broken,
    /// It was sent as a whole: the server may have it.
    #[error("the server did not say that it has it")]
    Unanswered,
    /// Us, not the mail: who we are, or whom it is from. Mended, it may go.
    #[error("the server refuses this sender: {0}")]
    SenderRefused(u16),
    /// For now.
    #[error("answered {0}")]
    Deferred(u16),
    #[error("the mail cannot be written to its folder")]
    NotWritten,
    /// For good.
    #[error("refused: {0}")]
    Refused(u16),
    #[error("the mail cannot be composed")]
    Malformed,
}

impl Unsent {
    /// Whether it is of no use to try again.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Refused(_) | Self::Malformed)
    }

    /// Whether the server may have it.
    pub fn is_unanswered(self) -> bool {
        matches!(self, Self::Unanswered)
    }
}

/// Composes mails and has them leave.
pub struct Mailer {
    from: Mailbox,
    service: String,
    link_base: String,
    templates: Templates,
    way: Way,
    longest: Duration,
}

enum Way {
    Smtp(Box<Smtp>),
    Folder(PathBuf),
}

/// A mail that can be sent. Not `Debug`: it may hold a token.
pub struct Mail {
    to: Address,
    message: Vec<u8>,
}

impl Mailer {
    /// `None` when nobody is to be mailed.
    ///
    /// # Errors
    /// What is wrong with the settings or the templates.
    pub fn new(settings: &MailSettings) -> Result<Option<Self>, MailError> {
        if !settings.is_configured() {
            return Ok(None);
        }
        let wrong = |key| move |message: String| MailError::Setting { key, message };
        let way = if settings.server.is_empty() {
            Way::Folder(settings.directory.clone())
        } else {
            Way::Smtp(Box::new(Smtp::new(settings)?))
        };
        let from = match settings.from.as_str() {
            // A folder needs none.
            "" => "tollkeeper@localhost.localdomain",
            from => from,
        };
        let from: Result<Email, _> = from.parse();
        let from = from.map_err(|why| wrong("mail.from")(why.into_owned()))?;
        let from = address(&from).ok_or_else(|| wrong("mail.from")("is no address".to_owned()))?;
        let name = Some(settings.from_name.clone()).filter(|name| !name.is_empty());
        let base = match settings.link_base.as_str() {
            "" => "http://localhost",
            base => base.trim_end_matches('/'),
        };
        Ok(Some(Self {
            from: Mailbox::new(name, from),
            service: settings.from_name.clone(),
            link_base: base.to_owned(),
            templates: Templates::load(&settings.templates)?,
            way,
            longest: settings.deadline + settings.reply_deadline,
        }))
    }

    /// Longest that [`Mailer::send`] takes, about.
    pub fn longest(&self) -> Duration {
        self.longest
    }

    /// Composes a mail; `token` is what its link carries. The same event has the same `Message-ID`, however
    /// often it is sent.
    ///
    /// # Errors
    /// `Malformed`
    pub fn compose(
        &self,
        id: Uuid,
        details: &MailDetails,
        token: Option<&str>,
        now: DateTime<Utc>,
    ) -> Result<Mail, Unsent> {
        let values = templates::Values::of(details, &self.service, &self.link_base, token);
        let letter = self.templates.letter(details.kind, &values);
        let to = address(&details.to).ok_or(Unsent::Malformed)?;
        let host = self.from.email.domain();
        let message = Message::builder()
            .from(self.from.clone())
            // No name: whoever registers with somebody else's address chooses one.
            .to(Mailbox::new(None, to.clone()))
            .subject(letter.subject)
            .date(now.into())
            .message_id(Some(format!("<{id}@{host}>")))
            // RFC 3834: no holiday notes, please.
            .header(AutoSubmitted)
            .multipart(MultiPart::alternative_plain_html(letter.text, letter.html))
            .map_err(|_| Unsent::Malformed)?;
        Ok(Mail {
            to,
            message: message.formatted(),
        })
    }

    /// Sends a mail once.
    ///
    /// # Errors
    /// Whatever is not the word of the server that it has it. Cut short, or `Unanswered`, it may have gone all
    /// the same.
    pub async fn send(&self, id: Uuid, mail: &Mail) -> Result<(), Unsent> {
        match &self.way {
            Way::Smtp(smtp) => smtp.send(&self.from.email, &mail.to, &mail.message).await,
            Way::Folder(folder) => {
                let file = folder.join(format!("{id}.eml"));
                write(&file, &mail.message).map_err(|_| Unsent::NotWritten)?;
                info!(file = %file.display(), "wrote a mail");
                Ok(())
            }
        }
    }
}

/// What both of us take for an address.
fn address(email: &Email) -> Option<Address> {
    email.as_str().parse().ok()
}

/// In one step, so that whoever watches the folder sees whole ones; for nobody else to read.
fn write(file: &Path, message: &[u8]) -> io::Result<()> {
    if let Some(folder) = file.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)?;
    }
    let part = file.with_extension("part");
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(&part)?.write_all(message)?;
    fs::rename(&part, file)
}

#[derive(Clone)]
struct AutoSubmitted;

impl lettre::message::header::Header for AutoSubmitted {
    fn name() -> lettre::message::header::HeaderName {
        lettre::message::header::HeaderName::new_from_ascii_str("Auto-Submitted")
    }

    fn parse(_: &str) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        Ok(Self)
    }

    fn display(&self) -> lettre::message::header::HeaderValue {
        let value = "auto-generated".to_owned();
        lettre::message::header::HeaderValue::new(Self::name(), value)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::{MailKind, MailedToken, OneTimeTokenId};

    fn mailer(change: impl FnOnce(&mut MailSettings)) -> Mailer {
        let mut settings = MailSettings {
            directory: "/nowhere".into(),
            from: "no-reply@example.com".to_owned(),
            link_base: "https://app.example.com/account/".to_owned(),
            ..MailSettings::default()
        };
        change(&mut settings);
        Mailer::new(&settings).expect("valid").expect("there")
    }

    fn details(kind: MailKind) -> MailDetails {
        let now = DateTime::from_timestamp(1_800_000_000, 0).expect("valid");
        MailDetails {
            kind,
            to: "someone@example.com".parse().expect("valid"),
            username: "some.one".parse().expect("valid"),
            token: Some(MailedToken {
                id: OneTimeTokenId::new(),
                created_at: now,
                expires_at: now + Duration::from_hours(24),
            }),
            at: now,
            user_agent: String::new(),
            address: String::new(),
        }
    }

    fn text_of(mailer: &Mailer, details: &MailDetails) -> String {
        let now = details.at;
        let mail = mailer.compose(Uuid::nil(), details, Some("tko_x-y_z"), now);
        let Ok(mail) = mail else { panic!("composed") };
        String::from_utf8(mail.message).expect("ASCII")
    }

    #[test]
    fn a_mail_has_both_texts_and_the_headers_it_should() {
        let text = text_of(&mailer(|_| {}), &details(MailKind::Reset));
        for line in [
            "From: Tollkeeper <no-reply@example.com>\r\n",
            "To: someone@example.com\r\n",
            "Subject: Set a new password\r\n",
            "Message-ID: <00000000-0000-0000-0000-000000000000@example.com>\r\n",
            "Auto-Submitted: auto-generated\r\n",
            "Content-Type: multipart/alternative;",
            "Content-Type: text/plain; charset=utf-8\r\n",
            "Content-Type: text/html; charset=utf-8\r\n",
            "Date: ",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        let link = "https://app.example.com/account/reset-password?token=tko_x-y_z";
        assert_eq!(
            text.replace("=\r\n", "")
                .replace("=3D", "=")
                .matches(link)
                .count(),
            3
        );
        assert!(!text.contains("{{") && !text.contains("some.one"), "{text}");
    }

    #[test]
    fn every_mail_is_composed_of_what_there_is() {
        let mailer = mailer(|_| {});
        for kind in MailKind::ALL {
            let text = text_of(&mailer, &details(kind));
            assert!(!text.contains("{{") && !text.contains("}}"), "{text}");
            assert!(text.contains("Subject: "), "{text}");
        }
    }

    #[test]
    fn a_client_that_calls_itself_html_is_text() {
        let mut details = details(MailKind::NewLogin);
        details.user_agent = "<b>&\"x\"'\r\nBcc: a@b.co\u{7f}".to_owned();
        details.address = "192.0.2.7".to_owned();
        let text = text_of(&mailer(|_| {}), &details);
        let text = text.replace("=\r\n", "");
        assert!(text.contains("Client: <b>&\"x\"'  Bcc: a@b.co"), "{text}");
        assert!(text.contains("&lt;b&gt;&amp;&quot;x&quot;&#39;"), "{text}");
        assert!(!text.contains("\nBcc"), "{text}");
    }

    #[test]
    fn a_name_of_any_letters_is_encoded() {
        let text = text_of(
            &mailer(|settings| settings.from_name = "Zöllner \"& Söhne\", <x>".to_owned()),
            &details(MailKind::Reset),
        );
        let from = text
            .lines()
            .find(|line| line.starts_with("From: "))
            .expect("a sender");
        assert!(
            from.is_ascii() && from.ends_with("<no-reply@example.com>"),
            "{from}"
        );
        assert!(!from.contains("<x>"), "{from}");
    }

    proptest! {
        /// Whatever is an address of ours is one of theirs, and adds no header.
        #[test]
        fn every_address_makes_one_recipient(
            local in "[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]{1,20}(\\.[a-z0-9!#$%&'*+/=?^_`{|}~-]{1,20}){0,2}",
            domain in "([a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?\\.){1,3}[a-z0-9]{2,8}",
        ) {
            let email: Email = format!("{local}@{domain}").parse().expect("ours");
            let details = MailDetails { to: email.clone(), ..details(MailKind::Verification) };
            let mailer = mailer(|_| {});
            let mail = mailer.compose(Uuid::nil(), &details, Some("t"), details.at);
            let Ok(mail) = mail else { panic!("composed") };
            prop_assert_eq!(mail.to.to_string(), email.to_string());
            let text = String::from_utf8(mail.message).expect("ASCII");
            let (head, _) = text.split_once("\r\n\r\n").expect("a head");
            let names = head.split("\r\n").filter(|line| !line.starts_with([' ', '\t'])).count();
            prop_assert_eq!(names, 8, "{}", head);
        }
    }
}
