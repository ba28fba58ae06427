//! Reads the tiers from their TOML file.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use toml::Spanned;

use crate::model::{TierLimits, TierName, Tiers};

const BUILT_IN: &str = include_str!("tiers.toml");

/// Most tiers and most tokens that make sense: beyond is a mistake.
const MAX_TIERS: usize = 100;
const MAX_TOKENS: i64 = 1_000_000_000_000_000;

#[derive(Debug, thiserror::Error)]
pub enum TiersError {
    #[error("cannot read the tiers file {path}")]
    File {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path}, line {line}: {message}")]
    Content {
        path: PathBuf,
        line: usize,
        message: String,
    },
}

/// Reads the tiers of `file`, or the built-in ones when the path is empty.
///
/// # Errors
/// Names the line that cannot be used.
pub fn load_tiers(file: &Path) -> Result<Tiers, TiersError> {
    if file.as_os_str().is_empty() {
        return parse(BUILT_IN).map_err(|wrong| wrong.at(Path::new("built-in tiers"), BUILT_IN));
    }
    let text = std::fs::read_to_string(file).map_err(|source| TiersError::File {
        path: file.to_owned(),
        source,
    })?;
    parse(&text).map_err(|wrong| wrong.at(file, &text))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    default: Spanned<String>,
    #[serde(default)]
    tier: Vec<Spanned<Tier>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tier {
    name: Spanned<String>,
    monthly_tokens: Option<Spanned<i64>>,
    max_request_tokens: Option<Spanned<i64>>,
}

/// What is wrong, and where in the text.
#[derive(Debug)]
struct Wrong {
    offset: usize,
    message: String,
}

impl Wrong {
    fn at(self, path: &Path, text: &str) -> TiersError {
        let before = &text.as_bytes()[..self.offset.min(text.len())];
        let line = before.iter().filter(|b| **b == b'\n').count() + 1;
        TiersError::Content {
            path: path.to_owned(),
            line,
            message: self.message,
        }
    }
}

fn parse(text: &str) -> Result<Tiers, Wrong> {
    let file: File = toml::from_str(text).map_err(|error| Wrong {
        offset: error.span().map_or(0, |span| span.start),
        message: error.message().to_owned(),
    })?;
    let wrong = |offset, message: String| Err(Wrong { offset, message });
    let mut all: Vec<TierLimits> = Vec::new();
    let mut names = HashSet::new();
    for tier in &file.tier {
        let Tier {
            name,
            monthly_tokens,
            max_request_tokens,
        } = tier.get_ref();
        let parsed: TierName = match name.get_ref().parse() {
            Ok(parsed) => parsed,
            Err(violation) => {
                return wrong(name.span().start, format!("a tier's name {violation}"));
            }
        };
        if !names.insert(parsed.clone()) {
            return wrong(name.span().start, format!("tier {parsed} is there twice"));
        }
        for (key, limit) in [
            ("monthly_tokens", monthly_tokens),
            ("max_request_tokens", max_request_tokens),
        ] {
            if let Some(limit) = limit
                && !(0..=MAX_TOKENS).contains(limit.get_ref())
            {
                let message = format!("{key} must be 0 to {MAX_TOKENS}");
                return wrong(limit.span().start, message);
            }
        }
        all.push(TierLimits {
            name: parsed,
            monthly_tokens: monthly_tokens.as_ref().map(|limit| *limit.get_ref()),
            max_request_tokens: max_request_tokens.as_ref().map(|limit| *limit.get_ref()),
        });
    }
    if all.len() > MAX_TIERS {
        return wrong(0, format!("at most {MAX_TIERS} tiers are allowed"));
    }
    let default = &file.default;
    match all
        .iter()
        .position(|tier| tier.name.as_str() == default.get_ref())
    {
        Some(default) => Ok(Tiers { all, default }),
        None => wrong(
            default.span().start,
            format!("default names no tier: {}", default.get_ref()),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> String {
        parse(text)
            .expect_err("refused")
            .at(Path::new("tiers.toml"), text)
            .to_string()
    }

    #[test]
    fn the_built_in_tiers_grow() {
        let tiers = load_tiers(Path::new("")).expect("valid");
        let names: Vec<&str> = tiers.all.iter().map(|tier| tier.name.as_str()).collect();
        assert_eq!(names, ["free", "starter", "builder", "advanced"]);
        assert_eq!(tiers.default_tier().name.as_str(), "free");
        assert!(tiers.all.is_sorted_by_key(|tier| tier.monthly_tokens));
    }

    #[test]
    fn errors_name_the_line() {
        let tier = "default = 'a'\n\n[[tier]]\nname = 'a'\n";
        assert!(parse(tier).is_ok());
        for (text, line, what) in [
            ("default = 'b'\n[[tier]]\nname = 'a'", 1, "names no tier"),
            (
                &format!("{tier}monthly_tokens = -1"),
                5,
                "monthly_tokens must be",
            ),
            (
                &format!("{tier}max_request_tokens = 9000000000000000000"),
                5,
                "must be",
            ),
            (&format!("{tier}monthly_token = 1"), 5, "unknown field"),
            (&format!("{tier}monthly_tokens = 'x'"), 5, "invalid type"),
            (&format!("{tier}\n[[tier]]\nname = 'a'"), 7, "twice"),
            (&format!("{tier}\n[[tier]]\nname = 'A b'"), 7, "a-z"),
            ("default = 'a'\n[[tier]", 2, ""),
            ("", 1, "default"),
        ] {
            let message = message(text);
            assert!(
                message.contains(&format!("line {line}:")) && message.contains(what),
                "{message}"
            );
        }
    }
}
