//! Lays the sources of settings over each other and remembers which one gave each value.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use toml::{Table, Value};

use super::{Settings, validate};

/// Keys whose values are never printed.
const SECRET_KEYS: [&str; 5] = [
    "database.url",
    "auth.jwt_secret",
    "auth.master_key",
    "webhook.secret",
    "mail.password",
];

/// Settings and where each came from.
#[derive(Clone)]
pub struct Loaded {
    pub settings: Settings,
    entries: BTreeMap<String, (Value, Origin)>,
}

/// Which source gave a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Default,
    File(PathBuf),
    Environment(String),
    Flag,
    /// Follows from the lack of a database URL.
    NoDatabase,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Environment(name) => f.write_str(name),
            Self::Flag => f.write_str("command line"),
            Self::NoDatabase => f.write_str("no database.url"),
        }
    }
}

/// A setting that cannot be used. Names the setting, never its value when that is secret.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("cannot read the settings file {path}")]
    File {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the settings file {path} is not TOML: {message}")]
    Syntax { path: PathBuf, message: String },
    #[error("unknown setting {key} (from {origin}){hint}")]
    Unknown {
        key: String,
        origin: Origin,
        hint: String,
    },
    #[error("setting {key} ({}): {message}", whence(.key, .origin))]
    Invalid {
        key: String,
        origin: Origin,
        message: String,
    },
}

/// Reads settings from `flags`, `environment` and `file`, in falling order of precedence.
///
/// `flags` are pairs of key and value. `environment` may hold anything; variables that begin with
/// `TOLLKEEPER_` and a section's name must be settings.
///
/// # Errors
/// Names the first setting that is unknown, has the wrong type, or is refused.
pub fn load(
    flags: &[(String, String)],
    environment: impl IntoIterator<Item = (String, String)>,
    file: Option<&Path>,
) -> Result<Loaded, SettingsError> {
    let mut layers = Layers::defaults();
    if let Some(path) = file {
        layers.add_file(path)?;
    }
    layers.add_environment(environment)?;
    for (key, text) in flags {
        layers.set_text(key, text, Origin::Flag)?;
    }
    layers.finish()
}

impl Loaded {
    /// Refuses weak secrets, and in production missing ones. For commands that use them.
    ///
    /// # Errors
    /// Names the first setting that is refused.
    pub fn check_secrets(&self) -> Result<(), SettingsError> {
        validate::secrets(&self.settings).map_err(|(key, message)| SettingsError::Invalid {
            key: key.to_owned(),
            origin: self
                .entries
                .get(key)
                .map_or(Origin::Default, |(_, origin)| origin.clone()),
            message,
        })
    }

    /// Every key with its value for people to read and its origin; secrets are hidden.
    pub fn describe(&self) -> impl Iterator<Item = (&str, String, &Origin)> {
        self.entries.iter().map(|(key, (value, origin))| {
            let hidden = SECRET_KEYS.contains(&key.as_str()) && value.as_str() != Some("");
            let shown = if hidden {
                "(hidden)".to_owned()
            } else {
                value.to_string()
            };
            (key.as_str(), shown, origin)
        })
    }
}

impl fmt::Debug for Loaded {
    /// As the settings show themselves: the entries hold secrets in the clear.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.settings.fmt(f)
    }
}

struct Layers {
    entries: BTreeMap<String, (Value, Origin)>,
}

impl Layers {
    fn defaults() -> Self {
        let table = Table::try_from(Settings::default()).expect("the defaults are plain values");
        let mut entries = BTreeMap::new();
        flatten("", table, &mut |key, value| {
            entries.insert(key, (value, Origin::Default));
        });
        Self { entries }
    }

    fn add_file(&mut self, path: &Path) -> Result<(), SettingsError> {
        let text = std::fs::read_to_string(path).map_err(|source| SettingsError::File {
            path: path.to_owned(),
            source,
        })?;
        let table = text
            .parse::<Table>()
            .map_err(|error| SettingsError::Syntax {
                path: path.to_owned(),
                message: syntax_message(&text, &error),
            })?;
        let mut values = Vec::new();
        flatten("", table, &mut |key, value| values.push((key, value)));
        values
            .into_iter()
            .try_for_each(|(key, value)| self.set(&key, value, Origin::File(path.to_owned())))
    }

    fn add_environment(
        &mut self,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<(), SettingsError> {
        let keys: BTreeMap<String, String> = self
            .entries
            .keys()
            .map(|key| (variable(key), key.clone()))
            .collect();
        let sections: Vec<String> = keys
            .values()
            .filter_map(|key| key.split_once('.'))
            .map(|(section, _)| format!("{}_", variable(section)))
            .collect();
        let mut variables: Vec<(String, String)> = environment.into_iter().collect();
        // The name with our prefix sorts later and so wins over `DATABASE_URL`.
        variables.sort();
        for (name, text) in variables {
            let origin = || Origin::Environment(name.clone());
            if let Some(key) = keys.get(&name) {
                self.set_text(key, &text, origin())?;
            } else if name == "DATABASE_URL" {
                self.set_text("database.url", &text, origin())?;
            } else if sections.iter().any(|section| name.starts_with(section))
                && !is_service_link(&name)
                && name != GATEWAY_KEY
            {
                let hint = hint(&name, keys.keys());
                return Err(SettingsError::Unknown {
                    key: name.clone(),
                    origin: origin(),
                    hint,
                });
            }
        }
        Ok(())
    }

    /// Sets a value given as text, in the type of the default.
    fn set_text(&mut self, key: &str, text: &str, origin: Origin) -> Result<(), SettingsError> {
        let kind = self.entries.get(key).map(|(value, _)| value);
        let invalid = |message: &str| SettingsError::Invalid {
            key: key.to_owned(),
            origin: origin.clone(),
            message: message.to_owned(),
        };
        let value = match kind {
            Some(Value::Integer(_)) => Value::Integer(
                text.trim()
                    .parse()
                    .map_err(|_| invalid("must be a whole number"))?,
            ),
            Some(Value::Boolean(_)) => Value::Boolean(
                text.trim()
                    .parse()
                    .map_err(|_| invalid("must be true or false"))?,
            ),
            _ => Value::String(text.to_owned()),
        };
        self.set(key, value, origin)
    }

    fn set(&mut self, key: &str, value: Value, origin: Origin) -> Result<(), SettingsError> {
        match self.entries.get_mut(key) {
            Some(entry) => *entry = (value, origin),
            None => {
                let hint = hint(key, self.entries.keys());
                return Err(SettingsError::Unknown {
                    key: key.to_owned(),
                    origin,
                    hint,
                });
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<Loaded, SettingsError> {
        let invalid = |key: &str, message: String| SettingsError::Invalid {
            key: key.to_owned(),
            origin: self
                .entries
                .get(key)
                .map_or(Origin::Default, |(_, origin)| origin.clone()),
            message,
        };
        // One key at a time over the defaults, so that an error names its key.
        for (key, (value, _)) in &self.entries {
            let mut table = Table::new();
            insert(&mut table, key, value.clone());
            table.try_into::<Settings>().map_err(|error| {
                // The parser's words quote the value.
                let secret = SECRET_KEYS.contains(&key.as_str());
                let message = if secret {
                    "must be a string"
                } else {
                    error.message()
                };
                invalid(key, message.to_owned())
            })?;
        }
        let mut table = Table::new();
        for (key, (value, _)) in &self.entries {
            insert(&mut table, key, value.clone());
        }
        let mut settings: Settings = table
            .try_into()
            .map_err(|error| invalid("settings", error.message().to_owned()))?;
        let implied = !settings.dev && !settings.database.url.is_set();
        settings.dev |= implied;
        validate::bounds(&settings).map_err(|(key, message)| invalid(key, message))?;
        let mut entries = self.entries;
        if implied {
            let dev = (Value::Boolean(true), Origin::NoDatabase);
            entries.insert("dev".to_owned(), dev);
        }
        Ok(Loaded { settings, entries })
    }
}

/// Where a wrong value is from; of one that nobody set, where to set it.
fn whence(key: &str, origin: &Origin) -> String {
    match origin {
        Origin::Default => format!("not set; in the environment: {}", variable(key)),
        origin => format!("from {origin}"),
    }
}

/// With it a gateway calls the service (`deploy/envoy/envoy.yaml`); both may be given one environment.
const GATEWAY_KEY: &str = "TOLLKEEPER_GATEWAY_KEY";

/// Whether an orchestrator made this variable: Kubernetes describes a service named
/// `tollkeeper-server` in `TOLLKEEPER_SERVER_PORT` and the like.
fn is_service_link(name: &str) -> bool {
    name.ends_with("_PORT")
        || ["_PORT_", "_SERVICE_HOST", "_SERVICE_PORT"]
            .iter()
            .any(|part| name.contains(part))
}

/// The environment variable of a key.
fn variable(key: &str) -> String {
    format!("TOLLKEEPER_{}", key.replace('.', "_").to_uppercase())
}

fn flatten(prefix: &str, table: Table, each: &mut impl FnMut(String, Value)) {
    for (name, value) in table {
        let key = if prefix.is_empty() {
            name
        } else {
            format!("{prefix}.{name}")
        };
        match value {
            Value::Table(table) => flatten(&key, table, each),
            value => each(key, value),
        }
    }
}

fn insert(table: &mut Table, key: &str, value: Value) {
    match key.split_once('.') {
        None => {
            table.insert(key.to_owned(), value);
        }
        Some((section, rest)) => {
            let section = table
                .entry(section)
                .or_insert_with(|| Value::Table(Table::new()))
                .as_table_mut()
                .expect("a section never is a value: keys come from the defaults");
            insert(section, rest, value);
        }
    }
}

/// " (did you mean …?)" when a known name resembles the unknown one.
fn hint<'a>(unknown: &str, known: impl Iterator<Item = &'a String>) -> String {
    let distance = |name: &str| {
        let mut row: Vec<usize> = (0..=name.len()).collect();
        for (i, a) in unknown.bytes().enumerate() {
            let mut diagonal = row[0];
            row[0] = i + 1;
            for (j, b) in name.bytes().enumerate() {
                let replaced = diagonal + usize::from(a != b);
                diagonal = row[j + 1];
                row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
            }
        }
        row[name.len()]
    };
    known
        .map(|name| (distance(name), name))
        .filter(|(distance, _)| *distance <= 3)
        .min()
        .map_or_else(String::new, |(_, name)| format!("; did you mean {name}?"))
}

/// The parser's words and the line, without the line's text: it may hold a secret.
fn syntax_message(text: &str, error: &toml::de::Error) -> String {
    let line = error
        .span()
        .map_or(0, |span| text[..span.start].lines().count().max(1));
    format!("{} (line {line})", error.message())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    fn message(flags: &[(&str, &str)], environment: &[(&str, &str)]) -> String {
        load(&env(flags), env(environment), None)
            .expect_err("refused")
            .to_string()
    }

    #[test]
    fn flags_win_over_environment_and_environment_over_defaults() {
        let loaded = load(
            &env(&[("server.max_streams", "3")]),
            env(&[
                ("TOLLKEEPER_SERVER_MAX_STREAMS", "2"),
                ("TOLLKEEPER_AUTH_ACCESS_TTL", "5m"),
            ]),
            None,
        )
        .expect("valid");
        assert_eq!(loaded.settings.server.max_streams, 3);
        assert_eq!(loaded.settings.auth.access_ttl.as_secs(), 300);
        let (_, shown, origin) = loaded
            .describe()
            .find(|(key, ..)| *key == "auth.access_ttl")
            .expect("every key is described");
        assert_eq!(shown, "\"5m\"");
        assert_eq!(origin.to_string(), "TOLLKEEPER_AUTH_ACCESS_TTL");
    }

    #[test]
    fn errors_name_the_setting() {
        assert_eq!(
            message(&[], &[("TOLLKEEPER_AUTH_ACESS_TTL", "5m")]),
            "unknown setting TOLLKEEPER_AUTH_ACESS_TTL (from TOLLKEEPER_AUTH_ACESS_TTL); \
             did you mean TOLLKEEPER_AUTH_ACCESS_TTL?"
        );
        assert!(message(&[("server.listen", "here")], &[]).starts_with("setting server.listen"));
        assert!(message(&[("auth.access_ttl", "soon")], &[]).contains("not a duration"));
        assert!(message(&[("server.max_streams", "many")], &[]).contains("whole number"));
        assert!(message(&[("auth.algorithm", "none")], &[]).contains("auth.algorithm"));
    }

    #[test]
    fn an_orchestrators_own_variables_are_left_alone() {
        let names = [
            ("TOLLKEEPER_PORT", "tcp://10.0.0.1"),
            ("TOLLKEEPER_SERVICE_HOST", "10.0.0.1"),
            ("TOLLKEEPER_SERVER_PORT_50051_TCP", "tcp://10.0.0.1"),
        ];
        assert!(load(&[], env(&names), None).is_ok());
    }

    #[test]
    fn every_secret_is_known_as_one() {
        let text = "a text of thirty-two bytes or so";
        let flags = SECRET_KEYS.map(|key| (key, text));
        let shown = format!("{:?}", load(&env(&flags), [], None).expect("valid"));
        assert_eq!(shown.matches("(hidden)").count(), SECRET_KEYS.len());
        assert_eq!(shown.matches("(unset)").count(), 0, "{shown}");
    }

    #[test]
    fn secrets_are_never_shown() {
        let secret = "0123456789abcdefghijklmnopqrstuvwxyz-THE-SECRET";
        let loaded =
            load(&[], env(&[("TOLLKEEPER_AUTH_MASTER_KEY", secret)]), None).expect("valid");
        let shown: String = loaded.describe().map(|(_, value, _)| value).collect();
        assert!(!shown.contains("THE-SECRET"));
        assert!(!format!("{loaded:?}").contains("THE-SECRET"));
    }
}
