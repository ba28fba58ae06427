//! Reads the tiers from their TOML file.

use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
};

use serde::Deserialize;
use toml::Spanned;

use crate::model::{ModelName, OnOutage, TierLimits, TierName, Tiers};

const BUILT_IN: &str = include_str!("tiers.toml");

/// Most of each that makes sense: beyond is a mistake.
const MAX_TIERS: usize = 100;
const MAX_MODELS: usize = 100;
const MAX_THRESHOLDS: usize = 10;
const MAX_REQUESTS_PER_MINUTE: i64 = 1_000_000;

/// Notices that are due where a tier does not say.
const THRESHOLDS: [u8; 2] = [80, 100];

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
    #[serde(default)]
    models: BTreeMap<Spanned<String>, Spanned<i64>>,
    requests_per_minute: Option<Spanned<i64>>,
    max_request_tokens: Option<Spanned<i64>>,
    on_outage: Option<Spanned<String>>,
    open_tokens: Option<Spanned<i64>>,
    thresholds: Option<Spanned<Vec<Spanned<i64>>>>,
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

fn wrong<T>(offset: usize, message: impl Into<String>) -> Result<T, Wrong> {
    let message = message.into();
    Err(Wrong { offset, message })
}

fn parse(text: &str) -> Result<Tiers, Wrong> {
    let file: File = toml::from_str(text).map_err(|error| Wrong {
        offset: error.span().map_or(0, |span| span.start),
        message: error.message().to_owned(),
    })?;
    let mut all: Vec<TierLimits> = Vec::new();
    let mut names = HashSet::new();
    for tier in &file.tier {
        let limits = tier_limits(tier.get_ref())?;
        let at = tier.get_ref().name.span().start;
        if !names.insert(limits.name.clone()) {
            return wrong(at, format!("tier {} is there twice", limits.name));
        }
        if names.len() > MAX_TIERS {
            return wrong(at, format!("at most {MAX_TIERS} tiers are allowed"));
        }
        all.push(limits);
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

fn tier_limits(tier: &Tier) -> Result<TierLimits, Wrong> {
    let name: TierName = match tier.name.get_ref().parse() {
        Ok(name) => name,
        Err(violation) => {
            return wrong(tier.name.span().start, format!("a tier's name {violation}"));
        }
    };
    let tokens = |key, limit| number(key, limit, 0, TierLimits::MAX_TOKENS);
    let requests_per_minute = number(
        "requests_per_minute",
        tier.requests_per_minute.as_ref(),
        1,
        MAX_REQUESTS_PER_MINUTE,
    )?;
    Ok(TierLimits {
        name,
        monthly_tokens: tokens("monthly_tokens", tier.monthly_tokens.as_ref())?,
        models: models(&tier.models)?,
        requests_per_minute,
        max_request_tokens: tokens("max_request_tokens", tier.max_request_tokens.as_ref())?,
        on_outage: on_outage(tier)?,
        thresholds: thresholds(tier.thresholds.as_ref())?,
    })
}

/// A number within bounds; `None` where the file says nothing.
fn number(
    key: &str,
    value: Option<&Spanned<i64>>,
    min: i64,
    max: i64,
) -> Result<Option<i64>, Wrong> {
    match value {
        Some(value) if !(min..=max).contains(value.get_ref()) => {
            wrong(value.span().start, format!("{key} must be {min} to {max}"))
        }
        value => Ok(value.map(|value| *value.get_ref())),
    }
}

fn models(
    models: &BTreeMap<Spanned<String>, Spanned<i64>>,
) -> Result<BTreeMap<ModelName, i64>, Wrong> {
    let mut limits = BTreeMap::new();
    for (name, limit) in models {
        let at = name.span().start;
        let parsed: ModelName = match name.get_ref().parse() {
            Ok(parsed) => parsed,
            Err(violation) => return wrong(at, format!("a model's name {violation}")),
        };
        let limit = number("a model's limit", Some(limit), 0, TierLimits::MAX_TOKENS)?;
        limits.extend(limit.map(|limit| (parsed, limit)));
        if limits.len() > MAX_MODELS {
            let message = format!("at most {MAX_MODELS} models of a tier can have limits");
            return wrong(at, message);
        }
    }
    Ok(limits)
}

fn on_outage(tier: &Tier) -> Result<OnOutage, Wrong> {
    let policy = tier.on_outage.as_ref();
    let open_tokens = tier.open_tokens.as_ref();
    match (policy.map(|policy| policy.get_ref().as_str()), policy) {
        (Some("open"), Some(policy)) => {
            match number("open_tokens", open_tokens, 1, TierLimits::MAX_TOKENS)? {
                Some(open_tokens) => Ok(OnOutage::Open { open_tokens }),
                None => wrong(
                    policy.span().start,
                    "on_outage = \"open\" needs open_tokens: how much it may go beyond the limit",
                ),
            }
        }
        (None | Some("closed"), _) => match open_tokens {
            Some(open_tokens) => wrong(
                open_tokens.span().start,
                "open_tokens goes with on_outage = \"open\" only",
            ),
            None => Ok(OnOutage::Closed),
        },
        (Some(_), policy) => wrong(
            policy.map_or(0, |policy| policy.span().start),
            "on_outage must be \"closed\" or \"open\"",
        ),
    }
}

fn thresholds(percents: Option<&Spanned<Vec<Spanned<i64>>>>) -> Result<Vec<u8>, Wrong> {
    let Some(percents) = percents else {
        return Ok(THRESHOLDS.to_vec());
    };
    if percents.get_ref().len() > MAX_THRESHOLDS {
        let message = format!("thresholds must be at most {MAX_THRESHOLDS}");
        return wrong(percents.span().start, message);
    }
    let mut thresholds: Vec<u8> = Vec::new();
    for percent in percents.get_ref() {
        let at = percent.span().start;
        match u8::try_from(*percent.get_ref()) {
            Ok(percent @ 1..=100) if thresholds.last().is_none_or(|last| *last < percent) => {
                thresholds.push(percent);
            }
            Ok(1..=100) => return wrong(at, "thresholds must ascend, each there once"),
            _ => return wrong(at, "a threshold must be 1 to 100, in percent"),
        }
    }
    Ok(thresholds)
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
        assert!(tiers.all.is_sorted_by_key(|tier| tier.requests_per_minute));
        for tier in &tiers.all {
            assert_eq!(tier.on_outage, OnOutage::Closed);
            assert_eq!(tier.thresholds, THRESHOLDS);
        }
    }

    #[test]
    fn every_key_is_read() {
        let tiers = parse(
            r#"
            default = "a"
            [[tier]]
            name = "a"
            monthly_tokens = 10
            requests_per_minute = 3
            max_request_tokens = 4
            on_outage = "open"
            open_tokens = 5
            thresholds = [50, 100]
            [tier.models]
            "gpt-5" = 6
            small = 0
            [[tier]]
            name = "b"
            thresholds = []
            on_outage = "closed"
            "#,
        );
        let models = [("gpt-5", 6), ("small", 0)];
        let expected = TierLimits {
            name: "a".parse().expect("valid"),
            monthly_tokens: Some(10),
            models: models
                .into_iter()
                .map(|(name, limit)| (name.parse().expect("valid"), limit))
                .collect(),
            requests_per_minute: Some(3),
            max_request_tokens: Some(4),
            on_outage: OnOutage::Open { open_tokens: 5 },
            thresholds: vec![50, 100],
        };
        let tiers = tiers.expect("valid");
        assert_eq!(tiers.all[0], expected);
        assert_eq!(tiers.all[1].thresholds, Vec::<u8>::new());
        assert_eq!(tiers.all[1].on_outage, OnOutage::Closed);
        assert!(tiers.all[1].models.is_empty());
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
            (&format!("{tier}requests_per_minute = 0"), 5, "must be 1 to"),
            (
                &format!("{tier}requests_per_minute = 1000001"),
                5,
                "must be 1 to",
            ),
            (&format!("{tier}on_outage = 'open'"), 5, "needs open_tokens"),
            (&format!("{tier}on_outage = 'ajar'"), 5, "closed"),
            (&format!("{tier}open_tokens = 5"), 5, "goes with on_outage"),
            (
                &format!("{tier}on_outage = 'closed'\nopen_tokens = 5"),
                6,
                "goes with on_outage",
            ),
            (
                &format!("{tier}on_outage = 'open'\nopen_tokens = 0"),
                6,
                "open_tokens must be",
            ),
            (&format!("{tier}thresholds = [0]"), 5, "1 to 100"),
            (&format!("{tier}thresholds = [\n80,\n101]"), 7, "1 to 100"),
            (&format!("{tier}thresholds = [80, 80]"), 5, "ascend"),
            (&format!("{tier}thresholds = [100, 80]"), 5, "ascend"),
            (
                &format!("{tier}thresholds = [1,2,3,4,5,6,7,8,9,10,11]"),
                5,
                "at most 10",
            ),
            (
                &format!("{tier}[tier.models]\nfine = 1\n'a b' = 1"),
                7,
                "a model's name",
            ),
            (
                &format!("{tier}[tier.models]\nfine = 1\nbad = -1"),
                7,
                "a model's limit",
            ),
            (
                &format!("{tier}[tier.models]\nbad = 1\nbad = 2"),
                7,
                "duplicate",
            ),
            (
                &(tier.to_owned()
                    + "[tier.models]\n"
                    + &(100..=200)
                        .map(|n| format!("m{n} = 1\n"))
                        .collect::<String>()),
                106,
                "at most 100 models",
            ),
            (
                &("default = 't1'\n".to_owned()
                    + &(1..=101)
                        .map(|n| format!("[[tier]]\nname = 't{n}'\n"))
                        .collect::<String>()),
                203,
                "at most 100 tiers",
            ),
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
