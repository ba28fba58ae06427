use std::{
    fs::{File, Metadata, Permissions},
    io::{self, IsTerminal as _, Write},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, fchown},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context as _, bail};
use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};
use tempfile::NamedTempFile;

use super::{ExportArgs, Format, NamedUser, month, named, time};
use crate::{
    cli::{folder_of, print, signals::Signals},
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
            output: args.output.filter(|path| !is_stdout(path)),
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
            let to = To("standard output", &mut io::stdout().lock());
            return match write(export, to, &progress).await {
                // Whoever read has enough.
                Err(error) if is_broken_pipe(&error) => Ok(()),
                outcome => outcome.map(drop),
            };
        };
        let (name, progress) = (path.display().to_string(), progress(size, false));
        if path.metadata().is_ok_and(|found| !found.is_file()) {
            let mut open = File::create(&path).with_context(|| cannot_write(&name))?;
            return write(export, To(&name, &mut open), &progress)
                .await
                .map(drop);
        }
        let mut signals = Signals::new()?;
        let written = tokio::select! {
            written = write_file(export, &path, &name, &progress) => written?,
            () = signals.received() => {
                tokio::spawn(signals.end_at_next());
                bail!("interrupted: {name} is as it was");
            }
        };
        let said = format!(
            "{} records, {}, in {:.1} s: {name}\n",
            HumanCount(written.records),
            HumanBytes(written.bytes),
            started.elapsed().as_secs_f64(),
        );
        print(said.as_bytes())
    }
}

/// Where an export is written, and what people call it.
struct To<'a, W>(&'a str, &'a mut W);

fn cannot_write(name: &str) -> String {
    format!("cannot write {name}")
}

/// Writes a whole export to a file, or nothing: what is not whole is of no use, and goes away, unless the
/// process is killed.
async fn write_file(
    export: usage::Export,
    path: &Path,
    name: &str,
    progress: &ProgressBar,
) -> anyhow::Result<Written> {
    let (target, mut draft) = draft(path).with_context(|| cannot_write(name))?;
    let written = write(export, To(name, &mut draft), progress).await?;
    draft
        .as_file()
        .sync_all()
        .and_then(|()| Ok(draft.persist(target)?))
        .with_context(|| cannot_write(name))?;
    Ok(written)
}

/// What a file is written as until it is whole, and the place that it takes then.
fn draft(path: &Path) -> io::Result<(PathBuf, NamedTempFile)> {
    // Known for what it is, should a killed process leave it.
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let prefix = format!(".{name}.");
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix);
    if !path.is_symlink() && !path.exists() {
        // Whoever may read any new file may read this one.
        builder.permissions(Permissions::from_mode(0o666));
        return Ok((path.to_owned(), builder.tempfile_in(folder_of(path))?));
    }
    // A link stays one.
    let target = path.canonicalize()?;
    let draft = builder.tempfile_in(folder_of(&target))?;
    give_to_readers_of(&target.metadata()?, draft.as_file())?;
    Ok((target, draft))
}

/// Whoever may read the old file may read the new one, and nobody else.
fn give_to_readers_of(old: &Metadata, new: &File) -> io::Result<()> {
    let made = new.metadata()?;
    if (made.uid(), made.gid()) != (old.uid(), old.gid()) {
        fchown(new, Some(old.uid()), Some(old.gid())).map_err(|error| {
            let said = format!("a new file in its place would not have its owner: {error}");
            io::Error::new(error.kind(), said)
        })?;
    }
    // A change of owners takes bits of the mode away, so this is last.
    new.set_permissions(old.permissions())
}

/// Writes a whole export.
async fn write(
    mut export: usage::Export,
    To(name, to): To<'_, impl Write>,
    progress: &ProgressBar,
) -> anyhow::Result<Written> {
    while let Some(chunk) = export.next_chunk().await? {
        to.write_all(&chunk).with_context(|| cannot_write(name))?;
        progress.set_position(export.written().records);
    }
    to.flush().with_context(|| cannot_write(name))?;
    progress.finish_and_clear();
    Ok(export.written())
}

/// A file of that name would take the place of what standard output is redirected to.
fn is_stdout(path: &Path) -> bool {
    ["-", "/dev/stdout", "/dev/fd/1"]
        .map(Path::new)
        .contains(&path)
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
