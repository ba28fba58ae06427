//! `usage`: the ledger for the operator, straight from the database.

mod export;
mod report;

use std::{path::PathBuf, time::Duration};

use chrono::{DateTime, NaiveDate, NaiveTime, Utc};
use clap::{Args, Subcommand, ValueEnum};

use super::{
    database::{Database, Preparation},
    named,
};
use crate::{
    config::Loaded,
    model::{Identifier, Period, UserId, Violation},
    store::Store,
};

/// How long one statement may take at least: a report reads a whole month, and nobody else waits.
const STATEMENT_TIMEOUT: Duration = Duration::from_mins(10);

#[derive(Subcommand)]
pub(super) enum Command {
    /// Write usage records to a file or to standard output
    ///
    /// Each user's newest first, several users' mixed. The file appears when it is whole.
    Export(ExportArgs),
    /// Show a month's usage as a table and a chart
    Report(ReportArgs),
}

#[derive(Args)]
pub(super) struct ExportArgs {
    #[command(flatten)]
    whose: Whose,
    /// Only this month, YYYY-MM
    #[arg(long)]
    month: Option<String>,
    /// Only from this time on: 2026-11-20 or 2026-11-20T12:00:00Z
    #[arg(long, value_name = "TIME")]
    from: Option<String>,
    /// Only before this time
    #[arg(long, value_name = "TIME")]
    to: Option<String>,
    /// Only this model
    #[arg(long)]
    model: Option<String>,
    /// What to write
    #[arg(long, value_enum, default_value_t = Format::Csv)]
    format: Format,
    /// File to write; else, or as `-`, standard output
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Whose {
    /// Id, e-mail address or username of the user
    #[arg(long)]
    user: Option<String>,
    /// Of all users
    #[arg(long)]
    all: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// With a header; values that a spreadsheet would take for formulas get an apostrophe
    Csv,
    /// A JSON object a line
    Ndjson,
}

#[derive(Args)]
pub(super) struct ReportArgs {
    /// Month, YYYY-MM; else the current one
    #[arg(long)]
    month: Option<String>,
    /// What to break it down by
    #[arg(long, value_enum, default_value_t = By::Model)]
    by: By,
    /// Only this user, by id, e-mail address or username
    #[arg(long)]
    user: Option<String>,
    /// How many models or users to show; the others are one line
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    top: u16,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum By {
    Model,
    User,
    Day,
}

pub(super) async fn run(command: Command, loaded: Loaded) -> anyhow::Result<()> {
    // What is wrong with the command is said before anything is started for it.
    let work = match command {
        Command::Export(args) => Work::Export(export::Export::read(args)?),
        Command::Report(args) => Work::Report(report::Report::read(args, Utc::now())?),
    };
    Preparation::None.check(&loaded.settings)?;
    let database = Database::open(&loaded.settings).await?;
    let outcome = async {
        Preparation::None.prepare(&database).await?;
        let mut settings = database.settings.clone();
        settings.statement_timeout = settings.statement_timeout.max(STATEMENT_TIMEOUT);
        let store = Store::new(&settings)?;
        let outcome = match work {
            Work::Export(export) => export.run(&store).await,
            Work::Report(report) => report.run(&store).await,
        };
        store.close();
        outcome
    }
    .await;
    database.close().await?;
    outcome
}

enum Work {
    Export(export::Export),
    Report(report::Report),
}

/// A user, as named on the command line.
enum NamedUser {
    Id(UserId),
    Identifier(Identifier),
}

impl NamedUser {
    fn read(text: &str) -> anyhow::Result<Self> {
        match text.parse() {
            Ok(id) => Ok(Self::Id(id)),
            Err(_) => named("--user", text.parse().map(Self::Identifier)),
        }
    }

    async fn find(&self, store: &Store) -> anyhow::Result<UserId> {
        Ok(match self {
            // Records outlive their user: an id need not be anybody's now.
            Self::Id(id) => *id,
            Self::Identifier(identifier) => store.user_by_identifier(identifier).await?.id,
        })
    }
}

fn month(text: Option<&str>) -> anyhow::Result<Option<Period>> {
    named("--month", text.map(str::parse).transpose())
}

/// Reads a time, or a day for its beginning.
fn time(text: &str) -> Result<DateTime<Utc>, Violation> {
    let day = || NaiveDate::parse_from_str(text, "%Y-%m-%d").ok();
    match DateTime::parse_from_rfc3339(text) {
        Ok(time) => Ok(time.to_utc()),
        Err(_) => match day() {
            Some(day) => Ok(day.and_time(NaiveTime::MIN).and_utc()),
            None => Err("must be a time such as 2026-11-20 or 2026-11-20T12:00:00Z".into()),
        },
    }
}
