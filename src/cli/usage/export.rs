use std::{
    fs::{self, File},
    io::{self, IsTerminal as _, Write},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context as _, bail};
use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};

use super::{ExportArgs, Format, NamedUser, month, named, time};
use crate::{
    model::UsageFilter,
    store::Store,
    usage::{self, ExportFormat, Written},
};

/// An export as asked for.
pub(super) struct Export {
    /// Of all, if of none.
    user: Option<NamedUser>,
    filter: UsageFilter,
    format: ExportFormat,
    output: Option<PathBuf>,
}

impl Export {
    pub(super) fn read(args: ExportArgs) -> anyhow::Result<Self> {
        let bound = |flag, text: Option<String>| named(flag, text.as_deref().map(time).transpose());
        let (start, end) = (bound("--from", args.from)?, bound("--to", args.to)?);
        if start.zip(end).is_some_and(|(start, end)| start >= end) {
            bail!("--from must be before --to");
        }
        let model = args.model.as_deref().map(str::parse).transpose();
        Ok(Self {
            user: args
                .whose
                .user
                .as_deref()
                .map(NamedUser::read)
                .transpose()?,
            filter: UsageFilter {
                period: month(args.month.as_deref())?,
                start,
                end,
                model: named("--model", model)?,
            },
            format: match args.format {
                Format::Csv => ExportFormat::Csv,
                Format::Ndjson => ExportFormat::Ndjson,
            },
            output: args.output,
        })
    }

    pub(super) async fn run(self, store: &Store) -> anyhow::Result<()> {
        let user_id = match &self.user {
            Some(user) => Some(user.find(store).await?),
            None => None,
        };
        let size = store.usage_export_size(user_id, &self.filter).await?;
        let export = usage::Export::new(store.clone(), user_id, self.filter, self.format);
        let started = Instant::now();
        let Some(path) = self.output else {
            // On a terminal the records are to be seen.
            let progress = progress(size, io::stdout().is_terminal());
            return match write(export, &mut io::stdout().lock(), &progress).await {
                // Whoever read has enough.
                Err(error) if is_broken_pipe(&error) => Ok(()),
                outcome => outcome.map(|_| ()),
            };
        };
        let written = write_file(export, &path, &progress(size, false)).await?;
        println!(
            "{} records, {}, in {:.1} s: {}",
            HumanCount(written.records),
            HumanBytes(written.bytes),
            started.elapsed().as_secs_f64(),
            path.display()
        );
        Ok(())
    }
}

/// Writes a whole export to a file, or nothing; where there is a device or a pipe, to that.
async fn write_file(
    export: usage::Export,
    path: &Path,
    progress: &ProgressBar,
) -> anyhow::Result<Written> {
    let cannot = || format!("cannot write {}", path.display());
    if path.metadata().is_ok_and(|found| !found.is_file()) {
        let mut open = File::create(path).with_context(cannot)?;
        return write(export, &mut open, progress).await;
    }
    // A link stays one.
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let draft = target.with_added_extension("part");
    let mut file = File::create(&draft).with_context(cannot)?;
    let outcome = write(export, &mut file, progress).await;
    let finished = outcome.and_then(|written| {
        file.sync_all().with_context(cannot)?;
        fs::rename(&draft, &target).with_context(cannot)?;
        Ok(written)
    });
    if finished.is_err() {
        // What is not whole is of no use.
        let _ = fs::remove_file(&draft);
    }
    finished
}

/// Writes a whole export.
async fn write(
    mut export: usage::Export,
    to: &mut impl Write,
    progress: &ProgressBar,
) -> anyhow::Result<Written> {
    while let Some(chunk) = export.next_chunk().await? {
        to.write_all(&chunk).context("cannot write")?;
        progress.set_position(export.written().records);
    }
    to.flush().context("cannot write")?;
    progress.finish_and_clear();
    Ok(export.written())
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let cause = error.downcast_ref::<io::Error>();
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

/// A bar on standard error, if that is a terminal.
fn progress(size: i64, hidden: bool) -> ProgressBar {
    if hidden {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(
        "{bar:32} {percent:>3} %  {human_pos} of {human_len} records, {eta} left",
    );
    let bar = ProgressBar::new(size.cast_unsigned());
    bar.set_style(
        style
            .expect("a template of known keys")
            .progress_chars("█▉▊▋▌▍▎▏ "),
    );
    bar
}
