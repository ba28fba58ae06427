use std::{net::IpAddr, path::PathBuf, time::Duration};

use http::Uri;
use serde::{Deserialize, Serialize};

use super::{Secret, duration};
use crate::model::Email;

/// How people are mailed. Without a server, and without a folder in dev mode, they are not.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MailSettings {
    /// SMTP server that takes mails: `smtp.example.com`, or with a port. Empty: none.
    pub server: String,
    /// How the connection to it is protected: starttls (port 587), tls (465), or none (25), which only a
    /// server on this machine may be spoken to by.
    pub tls: MailTls,
    /// PEM file of the authorities that the server's certificate may be from. Empty: those of the system.
    pub ca_file: PathBuf,
    /// Name at the server; empty: it is not asked for.
    pub user: String,
    pub password: Secret,
    /// Who mails are from: an address.
    pub from: String,
    /// The name in front of that address, and what the mails call this service.
    pub from_name: String,
    /// What links in mails begin with: `https://app.example.com/account`. `/verify-email?token=…` or
    /// `/reset-password?token=…` follows.
    pub link_base: String,
    /// Folder of templates that take the place of the built-in ones. Empty: none do.
    pub templates: PathBuf,
    /// Folder that mails are written to instead, in dev mode: `mail` in `data_dir` if there is no server.
    pub directory: PathBuf,
    /// Longest that an attempt may take until the server has heard what it is to take.
    #[serde(with = "duration")]
    pub deadline: Duration,
    /// Longest that it may take from then on until it has the mail and has said so. One that says so later
    /// has it again.
    #[serde(with = "duration")]
    pub reply_deadline: Duration,
    /// Whether users are told of logins from an address or a client that they have not used before.
    pub notify_logins: bool,
}

/// How the connection to the SMTP server is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MailTls {
    /// From the second word on, or not at all.
    StartTls,
    /// From the first byte on.
    Tls,
    /// In the clear.
    None,
}

impl Default for MailSettings {
    fn default() -> Self {
        Self {
            server: String::new(),
            tls: MailTls::StartTls,
            ca_file: PathBuf::new(),
            user: String::new(),
            password: Secret::default(),
            from: String::new(),
            from_name: "Tollkeeper".to_owned(),
            link_base: String::new(),
            templates: PathBuf::new(),
            directory: PathBuf::new(),
            deadline: Duration::from_mins(1),
            // RFC 5321, 4.5.3.2.6.
            reply_deadline: Duration::from_mins(10),
            notify_logins: false,
        }
    }
}

impl MailSettings {
    /// Whether mails go anywhere.
    pub fn is_configured(&self) -> bool {
        !self.server.is_empty() || !self.directory.as_os_str().is_empty()
    }

    /// Name and port of the server.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn host_and_port(&self) -> Result<(String, u16), &'static str> {
        let wrong = "must be a host such as smtp.example.com or smtp.example.com:587";
        let authority: http::uri::Authority = self.server.parse().map_err(|_| wrong)?;
        let host = authority.host().trim_matches(['[', ']']);
        if host.is_empty() || self.server.contains('@') {
            return Err(wrong);
        }
        // The parser takes a port that is none for no port.
        let has_port = self.server.rfind(':') > self.server.rfind(']') && !host.contains(':');
        let port = match (authority.port_u16(), has_port || authority.port().is_some()) {
            (Some(port), _) => port,
            (None, true) => return Err(wrong),
            (None, false) => match self.tls {
                MailTls::StartTls => 587,
                MailTls::Tls => 465,
                MailTls::None => 25,
            },
        };
        Ok((host.to_owned(), port))
    }

    /// The sender's address.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn sender(&self) -> Result<Email, String> {
        self.from.parse().map_err(|why| format!("{why}"))
    }

    /// Refuses what cannot work, and what would send secrets in the clear.
    pub(super) fn check(&self, dev: bool) -> Result<(), (&'static str, String)> {
        let refused = |key, message: &str| Err((key, message.to_owned()));
        if !self.directory.as_os_str().is_empty() {
            if !dev {
                return refused("mail.directory", "is for dev mode: mails hold secrets");
            }
            if !self.server.is_empty() {
                return refused("mail.directory", "cannot be set beside mail.server");
            }
        }
        if self.from_name.chars().any(char::is_control) || self.from_name.len() > 200 {
            let message = "must be at most 200 bytes without control characters";
            return refused("mail.from_name", message);
        }
        if !self.from.is_empty()
            && let Err(message) = self.sender()
        {
            return Err(("mail.from", message));
        }
        if !self.link_base.is_empty() {
            let uri: Option<Uri> = self.link_base.parse().ok();
            let parts = uri
                .as_ref()
                .map(|uri| (uri.scheme_str(), uri.host(), uri.query()));
            match parts {
                Some((Some("https"), Some(_), None)) => {}
                Some((Some("http"), Some(host), None)) if dev || is_here(host) => {}
                _ => {
                    let message = "must be a URL such as https://app.example.com/account";
                    return refused("mail.link_base", message);
                }
            }
        }
        if self.server.is_empty() {
            return Ok(());
        }
        let (host, _) = match self.host_and_port() {
            Ok(server) => server,
            Err(message) => return refused("mail.server", message),
        };
        if self.from.is_empty() {
            return refused("mail.from", "must be the address that mails are from");
        }
        if self.link_base.is_empty() {
            let message = "must be what links in mails begin with: https://app.example.com/account";
            return refused("mail.link_base", message);
        }
        if self.tls == MailTls::None && !dev && !is_here(&host) {
            let message = "must not be none for a server on another machine: mails hold secrets";
            return refused("mail.tls", message);
        }
        if self.user.is_empty() == self.password.is_set() {
            let message = "must be set together with mail.user, or not at all";
            return refused("mail.password", message);
        }
        Ok(())
    }
}

/// Whether a host is this machine.
fn is_here(host: &str) -> bool {
    let address: Option<IpAddr> = host.trim_matches(['[', ']']).parse().ok();
    host.eq_ignore_ascii_case("localhost") || address.is_some_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn production() -> MailSettings {
        MailSettings {
            server: "smtp.example.com".to_owned(),
            from: "no-reply@example.com".to_owned(),
            link_base: "https://app.example.com".to_owned(),
            ..MailSettings::default()
        }
    }

    fn refused(dev: bool, change: impl FnOnce(&mut MailSettings)) -> Option<&'static str> {
        let mut settings = production();
        change(&mut settings);
        settings.check(dev).err().map(|(key, _)| key)
    }

    #[test]
    fn what_cannot_work_or_is_not_protected_is_refused_by_name() {
        assert_eq!(MailSettings::default().check(false), Ok(()));
        assert_eq!(refused(false, |_| {}), None);
        let from = |from: &'static str| move |s: &mut MailSettings| s.from = from.to_owned();
        for wrong in [
            "",
            "me",
            "Me <me@example.com>",
            "me@example.com\r\nBcc: you@example.com",
        ] {
            assert_eq!(refused(false, from(wrong)), Some("mail.from"), "{wrong}");
        }
        let base = |base: &'static str| move |s: &mut MailSettings| s.link_base = base.to_owned();
        for wrong in [
            "",
            "app.example.com",
            "http://app.example.com",
            "https://a/?b=c",
            "a b",
        ] {
            let key = refused(false, base(wrong));
            assert_eq!(key, Some("mail.link_base"), "{wrong}");
        }
        assert_eq!(refused(true, base("http://app.example.com")), None);
        assert_eq!(refused(false, base("http://localhost:3000")), None);
        let clear = |server: &'static str| {
            move |s: &mut MailSettings| {
                s.tls = MailTls::None;
                s.server = server.to_owned();
            }
        };
        assert_eq!(refused(false, clear("smtp.example.com")), Some("mail.tls"));
        assert_eq!(refused(true, clear("smtp.example.com")), None);
        for here in ["localhost", "127.0.0.1:2525", "[::1]:25"] {
            assert_eq!(refused(false, clear(here)), None, "{here}");
        }
        let directory = |s: &mut MailSettings| s.directory = "/tmp/mails".into();
        assert_eq!(refused(false, directory), Some("mail.directory"));
        assert_eq!(refused(true, directory), Some("mail.directory"));
        let only_user = |s: &mut MailSettings| s.user = "me".to_owned();
        assert_eq!(refused(false, only_user), Some("mail.password"));
        let name = |s: &mut MailSettings| s.from_name = "a\nBcc: b".to_owned();
        assert_eq!(refused(false, name), Some("mail.from_name"));
    }

    #[test]
    fn a_server_is_a_host_with_the_port_of_its_protection() {
        let server = |server: &str, tls| {
            let settings = MailSettings {
                server: server.to_owned(),
                tls,
                ..MailSettings::default()
            };
            settings.host_and_port()
        };
        for (text, tls, host, port) in [
            ("mx.example.com", MailTls::StartTls, "mx.example.com", 587),
            ("mx.example.com", MailTls::Tls, "mx.example.com", 465),
            ("127.0.0.1", MailTls::None, "127.0.0.1", 25),
            ("mx.example.com:2525", MailTls::Tls, "mx.example.com", 2525),
            ("[::1]:2525", MailTls::None, "::1", 2525),
        ] {
            assert_eq!(server(text, tls), Ok((host.to_owned(), port)), "{text}");
        }
        for wrong in ["a b", "smtp://a", "u:p@a", ":25", "a:x", "a:99999", "a/b"] {
            assert!(server(wrong, MailTls::StartTls).is_err(), "{wrong}");
        }
    }
}
