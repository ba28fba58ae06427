use std::{fs, path::Path, path::PathBuf};

use tollkeeper::config::Settings;

use super::eventually;

/// A folder that servers of a test write their mails to.
pub(crate) struct Mailbox(tempfile::TempDir);

/// A mail, as far as tests look at it.
#[derive(Clone, Debug)]
pub(crate) struct Letter {
    pub(crate) to: String,
    pub(crate) subject: String,
    /// All of it, with what was encoded for the way decoded.
    pub(crate) text: String,
}

impl Letter {
    pub(crate) fn read(raw: &str) -> Self {
        let header = |name: &str| {
            let mut lines = raw.lines().take_while(|line| !line.is_empty());
            lines.find_map(|line| line.strip_prefix(name).map(str::to_owned))
        };
        Self {
            to: header("To: ").expect("a recipient"),
            subject: header("Subject: ").expect("a subject"),
            text: raw
                .replace("=\r\n", "")
                .replace("=\n", "")
                .replace("=3D", "="),
        }
    }

    /// What its link carries.
    pub(crate) fn token(&self) -> String {
        let (_, rest) = self.text.split_once("?token=").expect("a link");
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '-'));
        rest[..end.unwrap_or(rest.len())].to_owned()
    }
}

impl Mailbox {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    /// Has servers of these settings mail here.
    pub(crate) fn take(&self, settings: &mut Settings) {
        settings.mail.directory = self.path().to_owned();
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// All mails, the oldest first.
    pub(crate) fn all(&self) -> Vec<Letter> {
        let entries = fs::read_dir(self.path()).expect("a folder");
        let files = entries.map(|entry| entry.expect("a file").path());
        let mut files: Vec<PathBuf> = files
            .filter(|path| path.extension().is_some_and(|extension| extension == "eml"))
            .collect();
        // Named by ids that are ordered by time.
        files.sort();
        let read = |path: &PathBuf| fs::read_to_string(path).expect("a mail");
        files.iter().map(|path| Letter::read(&read(path))).collect()
    }

    pub(crate) fn to(&self, address: &str) -> Vec<Letter> {
        let all = self.all().into_iter();
        all.filter(|letter| letter.to == address).collect()
    }

    /// The mail to an address that makes it so many.
    pub(crate) async fn nth(&self, address: &str, number: usize) -> Letter {
        eventually("a mail", async || self.to(address).len() >= number).await;
        self.to(address).swap_remove(number - 1)
    }
}
