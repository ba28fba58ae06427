//! What is said of broken rows: the first to standard error, all to a file. Never what they hold.

use std::{
    fs::File,
    io::{BufWriter, Write as _},
    path::Path,
};

use anyhow::Context as _;
use serde_json::json;

use crate::{auth::RowFault, error::FieldViolation, grpc::row_reason, model::Violation};

/// Lines that people read.
const SHOWN: u64 = 20;

pub(super) struct Report {
    file: Option<To>,
    shown: u64,
}

enum To {
    Csv(Box<csv::Writer<File>>),
    Jsonl(BufWriter<File>),
}

impl Report {
    pub(super) fn create(path: Option<&Path>) -> anyhow::Result<Self> {
        let create = |path: &Path| {
            let file = File::create(path);
            let file = file.with_context(|| format!("cannot write {}", path.display()))?;
            if path.extension().is_some_and(|name| name == "jsonl") {
                return Ok(To::Jsonl(BufWriter::new(file)));
            }
            let mut csv = Box::new(csv::Writer::from_writer(file));
            csv.write_record(["line", "reason", "field", "message"])?;
            anyhow::Ok(To::Csv(csv))
        };
        Ok(Self {
            file: path.map(create).transpose()?,
            shown: 0,
        })
    }

    /// A row that could not even be read.
    pub(super) fn malformed(&mut self, line: u64, violation: &Violation) -> anyhow::Result<()> {
        self.show(format_args!("line {line}: {violation}"));
        self.write(line, "INVALID_FIELD", "", violation)
    }

    pub(super) fn refused(&mut self, line: i64, fault: RowFault) -> anyhow::Result<()> {
        let (line, reason, message) = (line.unsigned_abs(), row_reason(&fault), fault.to_string());
        self.show(format_args!("line {line}: {message}"));
        let fields = fault.fields();
        if fields.is_empty() {
            return self.write(line, reason, "", &message);
        }
        for FieldViolation { field, description } in fields {
            self.write(line, reason, &field, &description)?;
        }
        Ok(())
    }

    /// Says how many were not shown, and brings the file to an end.
    pub(super) fn finish(&mut self, broken: u64) -> anyhow::Result<()> {
        if broken > SHOWN {
            let hint = match self.file {
                Some(_) => "",
                None => "; --errors FILE has them all",
            };
            eprintln!("and {} more{hint}", broken - SHOWN);
        }
        match &mut self.file {
            Some(To::Csv(csv)) => csv.flush(),
            Some(To::Jsonl(lines)) => lines.flush(),
            None => Ok(()),
        }
        .context("cannot write the file of errors")
    }

    fn show(&mut self, line: std::fmt::Arguments<'_>) {
        if self.shown < SHOWN {
            eprintln!("{line}");
        }
        self.shown += 1;
    }

    fn write(&mut self, line: u64, reason: &str, field: &str, message: &str) -> anyhow::Result<()> {
        match &mut self.file {
            Some(To::Csv(csv)) => csv.write_record([&*line.to_string(), reason, field, message])?,
            Some(To::Jsonl(lines)) => {
                let row = json!({
                    "line": line, "reason": reason, "field": field, "message": message,
                });
                writeln!(lines, "{row}")?;
            }
            None => {}
        }
        Ok(())
    }
}
