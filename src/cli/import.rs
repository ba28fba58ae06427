//! `users import`: users of another system from a file, straight into the database.

mod errors;
mod file;
mod values;

use std::{
    io::{self, IsTerminal as _},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use chrono::Utc;
use clap::{Args, ValueEnum};
use indicatif::{HumanCount, ProgressBar, ProgressStyle};

use super::{accounts::with_auth_on, database::Preparation, named, signals::Signals};
use crate::{
    auth::{Import, ImportOptions, ImportRow, Imported, RowFault},
    config::Loaded,
    error::Error,
    model::{ImportSource, Origin, Tiers},
    usage::load_tiers,
};
use errors::Report;
use file::{Read, Rows};

/// Rows that are committed together.
const BATCH_ROWS: usize = 500;

/// A signal is known of well within this.
const SIGNAL_BEHIND_END: Duration = Duration::from_millis(200);

/// While the database is away: a switch-over takes about as long.
const TRIES: u32 = 5;
const TRY_AGAIN: Duration = Duration::from_secs(2);

#[derive(Args)]
pub(super) struct ImportArgs {
    /// CSV with a header, or a JSON object a line; `-` is standard input
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Check everything, against the database too, and write nothing; its schema must be up to date
    #[arg(long)]
    dry_run: bool,
    /// What the file is; else by its name: .csv, .jsonl, .ndjson
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// The system that the users come from, the same in every run; else the file's name
    ///
    /// Rows without an id are known by it and their e-mail address.
    #[arg(long, value_name = "NAME")]
    source: Option<String>,
    /// What to do when a row is broken
    #[arg(long, value_enum, default_value_t = OnError::Continue)]
    on_error: OnError,
    /// Write every broken row's line, field and reason to this file: CSV, or JSON lines if it is
    /// called .jsonl
    #[arg(long, value_name = "FILE")]
    errors: Option<PathBuf>,
    /// Let rows make administrators
    #[arg(long)]
    allow_admins: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Csv,
    Jsonl,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnError {
    /// Import the others
    Continue,
    /// End with the batch that the row is in; up to 500 are imported together
    Stop,
}

/// How many rows became what.
#[derive(Clone, Copy, Default)]
struct Counts {
    imported: u64,
    before: u64,
    broken: u64,
}

/// Why an import ended before its file.
enum Cut {
    /// Asked to.
    Interrupted,
    Broken,
}

pub(super) async fn run(args: ImportArgs, loaded: Loaded) -> anyhow::Result<()> {
    // What is wrong with the command is said before anything is started for it.
    let tiers = Arc::new(load_tiers(&loaded.settings.usage.tiers_file)?);
    let is_stdin = args.file.as_os_str() == "-";
    let format = match args.format {
        Some(format) => format,
        None => match args.file.extension().and_then(|name| name.to_str()) {
            Some("csv") => Format::Csv,
            Some("jsonl" | "ndjson") => Format::Jsonl,
            _ => bail!("--format is needed: the file is called neither .csv nor .jsonl"),
        },
    };
    let source = match (&args.source, args.file.file_stem()) {
        (Some(source), _) => named::<ImportSource>("--source", source.parse()),
        (None, Some(stem)) if !is_stdin => named("the file's name", stem.to_string_lossy().parse())
            .context("--source is needed: the file's name cannot be one"),
        (None, _) => bail!("--source is needed with standard input"),
    };
    let options = ImportOptions {
        source: source?,
        dry_run: args.dry_run,
        allow_admins: args.allow_admins,
    };
    let rows = Rows::open((!is_stdin).then_some(&*args.file), format == Format::Jsonl)?;
    if let Some(errors) = &args.errors {
        ensure!(!rows.is_of(errors), "--errors is the file to import");
    }
    let bar = progress(rows.size());
    let preparation = match args.dry_run {
        true => Preparation::None,
        false => Preparation::Up,
    };
    with_auth_on(&loaded, preparation, async move |auth| {
        // A file from before is lost only to one that begins.
        let report = Report::create(args.errors.as_deref())?;
        let work = Work {
            import: auth.import(options, Origin::operator()),
            tiers,
            rows,
            report,
            bar,
            counts: Counts::default(),
            stops_at_broken: args.on_error == OnError::Stop,
            is_stdin,
            settled: 0,
        };
        work.run().await
    })
    .await
}

/// An import under way.
struct Work {
    import: Import,
    tiers: Arc<Tiers>,
    rows: Rows,
    report: Report,
    bar: ProgressBar,
    counts: Counts,
    stops_at_broken: bool,
    is_stdin: bool,
    /// The line up to which all is done.
    settled: u64,
}

impl Work {
    async fn run(mut self) -> anyhow::Result<()> {
        let started = Instant::now();
        let interrupted = interrupted()?;
        let outcome = self.all(&interrupted).await;
        self.bar.finish_and_clear();
        // What is known of broken rows is kept, whatever ended the import.
        self.report.finish(self.counts.broken)?;
        let cut = outcome.inspect_err(|_| self.summary(started))?;
        self.summary(started);
        let again = "run the same command again: what is there is left as it is";
        match (cut, self.counts.broken) {
            (Some(Cut::Interrupted), _) => bail!(
                "interrupted behind line {}; to go on, {again}",
                self.settled
            ),
            (Some(Cut::Broken), _) => bail!(
                "stopped behind line {}; to go on with a mended file, {again}",
                self.settled
            ),
            (None, 0) => Ok(()),
            (None, broken) => bail!("{} rows are broken", HumanCount(broken)),
        }
    }

    /// Imports batch by batch, until the end or a reason to stop.
    async fn all(&mut self, interrupted: &AtomicBool) -> anyhow::Result<Option<Cut>> {
        loop {
            let mut batch = Vec::new();
            let broken = self.counts.broken;
            let mut is_last = false;
            for _ in 0..BATCH_ROWS {
                if interrupted.load(Ordering::Relaxed)
                    || (self.stops_at_broken && self.counts.broken > broken)
                {
                    break;
                }
                match self.rows.next()? {
                    Some(Read::Row(row)) => batch.push(*row),
                    Some(Read::Broken(line, violation)) => {
                        self.counts.broken += 1;
                        let bar = self.bar.clone();
                        bar.suspend(|| self.report.malformed(line, &violation))?;
                    }
                    None => {
                        is_last = true;
                        break;
                    }
                }
            }
            if is_last && self.is_stdin {
                // Ctrl-C ends all of a pipeline: the end of what the first one writes may be seen
                // before the signal.
                tokio::time::sleep(SIGNAL_BEHIND_END).await;
            }
            if interrupted.load(Ordering::Relaxed) {
                // What was read may be cut short, and is read again by who goes on.
                return Ok(Some(Cut::Interrupted));
            }
            self.take(batch).await?;
            self.settled = self.rows.line();
            self.bar.set_position(self.rows.position());
            self.bar.set_message(HumanCount(self.done()).to_string());
            if self.stops_at_broken && self.counts.broken > broken {
                return Ok(Some(Cut::Broken));
            }
            if is_last {
                return Ok(None);
            }
        }
    }

    async fn take(&mut self, batch: Vec<ImportRow>) -> anyhow::Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let lines: Vec<i64> = batch.iter().map(|row| row.row).collect();
        let mut tries = 1;
        let outcomes = loop {
            match self.import.take(&batch, &self.tiers, Utc::now()).await {
                Err(Error::Unavailable(_)) if tries < TRIES => {
                    tries += 1;
                    tokio::time::sleep(TRY_AGAIN).await;
                }
                taken => {
                    let last = lines.last().copied().unwrap_or_default();
                    break taken.with_context(|| {
                        format!(
                            "cannot import the rows up to line {last}; to go on, run the same \
                             command again: what is there is left as it is"
                        )
                    })?;
                }
            }
        };
        for (line, outcome) in lines.into_iter().zip(outcomes) {
            match outcome {
                Imported::Now => self.counts.imported += 1,
                Imported::Before => self.counts.before += 1,
                Imported::Refused(fault) => self.refused(line, fault)?,
            }
        }
        Ok(())
    }

    fn refused(&mut self, line: i64, fault: RowFault) -> anyhow::Result<()> {
        self.counts.broken += 1;
        let bar = self.bar.clone();
        bar.suspend(|| self.report.refused(line, fault))
    }

    fn done(&self) -> u64 {
        self.counts.imported + self.counts.before + self.counts.broken
    }

    fn summary(&self, started: Instant) {
        let took = started.elapsed().as_secs_f64();
        let imported = match self.import.options().dry_run {
            true => "to import",
            false => "imported",
        };
        println!(
            "{imported:<14}{}\n{:<14}{}\n{:<14}{}\n{:<14}{took:.1} s, {:.0} rows/s",
            HumanCount(self.counts.imported),
            "already there",
            HumanCount(self.counts.before),
            "broken",
            HumanCount(self.counts.broken),
            "took",
            self.done() as f64 / took.max(0.001),
        );
    }
}

/// Turns true when the process is asked to end; a batch under way is to be settled first.
fn interrupted() -> anyhow::Result<Arc<AtomicBool>> {
    let mut signals = Signals::new()?;
    let is_asked = Arc::new(AtomicBool::new(false));
    let told = is_asked.clone();
    tokio::spawn(async move {
        signals.received().await;
        told.store(true, Ordering::Relaxed);
        eprintln!("ending after this batch; once more ends at once");
        signals.end_at_next().await;
    });
    Ok(is_asked)
}

/// A bar on standard error, if that is a terminal.
fn progress(size: Option<u64>) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let (bar, template) = match size {
        Some(size) => (
            ProgressBar::new(size),
            "{bar:32} {percent:>3} %  {msg} rows, {eta} left",
        ),
        None => (ProgressBar::new_spinner(), "{spinner} {msg} rows"),
    };
    let style = ProgressStyle::with_template(template).expect("a template of known keys");
    bar.set_style(style);
    bar
}
