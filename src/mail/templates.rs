//! The words of mails: texts with `{{placeholders}}`, a plain one and one of HTML for each kind.

use std::{borrow::Cow, collections::HashMap, fs, io, path::Path, time::Duration};

use chrono::SecondsFormat;

use super::MailError;
use crate::model::{MailDetails, MailKind};

/// What placeholders may be named.
const NAMES: [&str; 8] = [
    "service",
    "username",
    "link",
    "token",
    "valid_for",
    "at",
    "address",
    "client",
];

const SUBJECT: &str = "Subject: ";

macro_rules! built_in {
    ($name:literal) => {
        (
            include_str!(concat!("templates/", $name, ".txt")),
            include_str!(concat!("templates/", $name, ".html")),
        )
    };
}

fn built_in(kind: MailKind) -> (&'static str, &'static str) {
    match kind {
        MailKind::Verification => built_in!("verification"),
        MailKind::Reset => built_in!("reset"),
        MailKind::AddressChange => built_in!("address_change"),
        MailKind::AddressChangeAsked => built_in!("address_change_asked"),
        MailKind::AddressChanged => built_in!("address_changed"),
        MailKind::PasswordChanged => built_in!("password_changed"),
        MailKind::NewLogin => built_in!("new_login"),
    }
}

/// The templates in force, one pair for each kind.
#[derive(Debug)]
pub(super) struct Templates(Vec<(MailKind, Template)>);

#[derive(Debug)]
struct Template {
    subject: String,
    text: String,
    html: String,
}

/// A mail's words.
pub(super) struct Letter {
    pub(super) subject: String,
    pub(super) text: String,
    pub(super) html: String,
}

/// What stands in for the placeholders.
pub(super) struct Values(HashMap<&'static str, String>);

impl Values {
    pub(super) fn of(
        details: &MailDetails,
        service: &str,
        link_base: &str,
        token: Option<&str>,
    ) -> Self {
        let token = token.unwrap_or_default();
        let page = match details.kind {
            MailKind::Reset => "reset-password",
            _ => "verify-email",
        };
        let valid_for = details.token.map(|token| {
            let whole = token.expires_at - token.created_at;
            in_words(whole.to_std().unwrap_or_default())
        });
        let known = |text: &str| match text {
            "" => "unknown".to_owned(),
            text => text.to_owned(),
        };
        let values = [
            service.to_owned(),
            details.username.to_string(),
            // Base64url: nothing that a URL would read otherwise.
            format!("{link_base}/{page}?token={token}"),
            token.to_owned(),
            valid_for.unwrap_or_default(),
            details
                .at
                .to_rfc3339_opts(SecondsFormat::Secs, true)
                .replace('T', " ")
                .replace('Z', " UTC"),
            known(&details.address),
            known(&details.user_agent),
        ];
        let values = values.map(|value| value.replace(char::is_control, " "));
        Self(NAMES.into_iter().zip(values).collect())
    }
}

impl Templates {
    /// The built-in ones, and those of a folder in their places: `reset.txt`, `reset.html` and so on.
    pub(super) fn load(folder: &Path) -> Result<Self, MailError> {
        let mut all = Vec::new();
        for kind in MailKind::ALL {
            let (text, html) = built_in(kind);
            let text = of_folder(folder, kind, "txt", text)?;
            let html = of_folder(folder, kind, "html", html)?;
            let template =
                Template::read(&text, &html).map_err(|(what, message)| MailError::Template {
                    path: folder.join(format!("{}.{what}", kind.as_str())),
                    message,
                })?;
            all.push((kind, template));
        }
        Ok(Self(all))
    }

    pub(super) fn letter(&self, kind: MailKind, values: &Values) -> Letter {
        let (_, template) = self
            .0
            .iter()
            .find(|(one, _)| *one == kind)
            .expect("there is one for each kind");
        let plain = |name: &str| Cow::Borrowed(&*values.0[name]);
        Letter {
            subject: fill(&template.subject, plain),
            text: fill(&template.text, plain),
            html: fill(&template.html, |name| escape(&values.0[name]).into()),
        }
    }
}

fn of_folder<'a>(
    folder: &Path,
    kind: MailKind,
    extension: &str,
    otherwise: &'a str,
) -> Result<Cow<'a, str>, MailError> {
    if folder.as_os_str().is_empty() {
        return Ok(otherwise.into());
    }
    let path = folder.join(format!("{}.{extension}", kind.as_str()));
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text.into()),
        // A folder that is not there is a mistake, a file is not.
        Err(error) if error.kind() == io::ErrorKind::NotFound && folder.is_dir() => {
            Ok(otherwise.into())
        }
        Err(source) => Err(MailError::Read { path, source }),
    }
}

impl Template {
    /// The first line of the text is the subject, an empty one follows.
    fn read(text: &str, html: &str) -> Result<Self, (&'static str, String)> {
        let text = text.replace("\r\n", "\n");
        let head = text.split_once("\n\n");
        let subject = head.and_then(|(head, _)| head.strip_prefix(SUBJECT));
        let Some((subject, (_, body))) = subject.zip(head) else {
            let message = "must begin with a line `Subject: …` and an empty line";
            return Err(("txt", message.to_owned()));
        };
        if subject.chars().any(char::is_control) {
            return Err(("txt", "must have a subject of one line".to_owned()));
        }
        check(&text).map_err(|message| ("txt", message))?;
        check(html).map_err(|message| ("html", message))?;
        Ok(Self {
            subject: subject.to_owned(),
            text: body.to_owned(),
            html: html.to_owned(),
        })
    }
}

/// Whether all placeholders of a template are known.
fn check(template: &str) -> Result<(), String> {
    let mut rest = template;
    while let Some((_, after)) = rest.split_once("{{") {
        let name = after.split_once("}}").map(|(name, _)| name);
        match name.filter(|name| NAMES.contains(name)) {
            Some(name) => rest = &after[name.len()..],
            None => {
                let names = NAMES.join(", ");
                return Err(format!(
                    "must hold no other {{{{placeholders}}}} than {names}"
                ));
            }
        }
    }
    Ok(())
}

/// What was filled in is not looked at again.
fn fill<'a>(template: &str, value: impl Fn(&str) -> Cow<'a, str>) -> String {
    let mut filled = String::new();
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("{{") {
        let (name, after) = after.split_once("}}").expect("checked when it was read");
        filled.push_str(before);
        filled.push_str(&value(name));
        rest = after;
    }
    filled.push_str(rest);
    filled
}

/// For text and attributes of HTML.
fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

/// In the largest unit of which it is several, or one.
fn in_words(duration: Duration) -> String {
    let minutes = duration.as_secs().div_ceil(60).max(1);
    let (count, unit) = match minutes {
        m if m % (24 * 60) == 0 && m > 24 * 60 => (m / (24 * 60), "day"),
        m if m % 60 == 0 => (m / 60, "hour"),
        m => (m, "minute"),
    };
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {unit}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_good_templates() {
        let templates = Templates::load(Path::new("")).expect("good");
        assert_eq!(templates.0.len(), MailKind::ALL.len());
    }

    #[test]
    fn a_folder_takes_the_place_of_those_it_has_and_mistakes_are_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text);
        write("reset.txt", "Subject: Hi {{username}}\n\nGo to {{link}}").expect("written");
        let templates = Templates::load(folder.path()).expect("good");
        let reset = templates
            .0
            .iter()
            .find(|(kind, _)| *kind == MailKind::Reset);
        assert_eq!(reset.expect("there").1.subject, "Hi {{username}}");
        for (text, says) in [
            ("Hello", "must begin with"),
            ("Subject: a\n\n{{nam}}", "placeholders"),
            ("Subject: a\n\n{{link", "placeholders"),
            ("Subject: a\rBcc: b\n\nx", "one line"),
        ] {
            write("reset.txt", text).expect("written");
            let error = Templates::load(folder.path()).expect_err("refused");
            let error = error.to_string();
            assert!(
                error.contains(says) && error.contains("reset.txt"),
                "{error}"
            );
        }
        let missing = folder.path().join("missing");
        assert!(matches!(
            Templates::load(&missing),
            Err(MailError::Read { .. })
        ));
    }

    #[test]
    fn what_is_filled_in_is_no_template() {
        let value = |name: &str| Cow::Owned(format!("<{name}{{{{link}}}}>"));
        assert_eq!(fill("a {{at}} b", value), "a <at{{link}}> b");
    }

    #[test]
    fn durations_are_words() {
        for (minutes, words) in [
            (1, "1 minute"),
            (45, "45 minutes"),
            (60, "1 hour"),
            (90, "90 minutes"),
            (24 * 60, "24 hours"),
            (72 * 60, "3 days"),
        ] {
            assert_eq!(in_words(Duration::from_mins(minutes)), words);
        }
    }
}
