//! Usage records as a file: bytes made as they are wanted, in constant memory.

mod places;

use std::{io::Write as _, vec};

use bytes::Bytes;
use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;

pub use places::ExportPlace;

pub(super) use places::ExportPlaces;

use crate::{
    error::{Error, Result},
    model::{Labels, UsageCursor, UsageFilter, UsageRecord, UserId},
    store::Store,
};

/// Records that are read at a time. With the largest labels they take some 20 MB.
const BATCH_RECORDS: i64 = 1000;

/// Bytes of a chunk at most; no record takes more than half of that.
const CHUNK_BYTES: usize = 64 * 1024;

/// The columns of CSV and the keys of NDJSON.
const COLUMNS: &str = "user_id,occurred_at,event_id,model,input_tokens,output_tokens,\
    cached_input_tokens,cache_write_tokens,reasoning_tokens,total_tokens,request_id,labels,\
    recorded_at";

/// What the file looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportFormat {
    /// RFC 4180, guarded against formula injection.
    Csv,
    /// One JSON object a line.
    Ndjson,
}

/// An export under way. Between chunks it holds no connection, and the records of one batch at most.
pub struct Export {
    store: Store,
    whose: Option<UserId>,
    filter: UsageFilter,
    format: ExportFormat,
    /// Read and not yet written.
    records: vec::IntoIter<UsageRecord>,
    /// The last that was read.
    after: Option<(UserId, UsageCursor)>,
    /// Lines that are written and not yet handed out.
    lines: Vec<u8>,
    written: Written,
    is_read: bool,
}

/// How much of a file there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    pub records: u64,
    pub bytes: u64,
}

impl Export {
    /// An export of one user's records, or of everybody's.
    pub fn new(
        store: Store,
        whose: Option<UserId>,
        filter: UsageFilter,
        format: ExportFormat,
    ) -> Self {
        let mut lines = Vec::new();
        if format == ExportFormat::Csv {
            lines.extend_from_slice(COLUMNS.as_bytes());
            lines.extend_from_slice(b"\r\n");
        }
        Self {
            store,
            whose,
            filter,
            format,
            records: Vec::new().into_iter(),
            after: None,
            lines,
            written: Written::default(),
            is_read: false,
        }
    }

    /// The next bytes of the file: whole lines, at most 64 KiB; `None` at its end.
    ///
    /// Cancel-safe: a dropped future loses nothing.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn next_chunk(&mut self) -> Result<Option<Bytes>> {
        loop {
            while let Some(record) = self.records.as_slice().first() {
                let begun = self.lines.len();
                write_record(record, self.format, &mut self.lines).map_err(Error::internal)?;
                if self.lines.len() > CHUNK_BYTES && begun > 0 {
                    let chunk = self.lines.drain(..begun).collect();
                    self.records.next();
                    self.written.records += 1;
                    return Ok(Some(self.handed_out(chunk)));
                }
                self.records.next();
                self.written.records += 1;
            }
            if self.is_read {
                let rest = std::mem::take(&mut self.lines);
                return Ok((!rest.is_empty()).then(|| self.handed_out(rest)));
            }
            self.read().await?;
        }
    }

    /// How much has been written; once `next_chunk` has answered `None`, all of it.
    pub fn written(&self) -> Written {
        self.written
    }

    async fn read(&mut self) -> Result<()> {
        let batch = self
            .store
            .usage_export_batch(self.whose, &self.filter, self.after, BATCH_RECORDS)
            .await?;
        match batch.last() {
            Some(UsageRecord { event, .. }) => {
                let cursor = UsageCursor {
                    occurred_at: event.occurred_at,
                    event_id: event.event_id,
                };
                self.after = Some((event.user_id, cursor));
            }
            None => self.is_read = true,
        }
        self.records = batch.into_iter();
        Ok(())
    }

    fn handed_out(&mut self, chunk: Vec<u8>) -> Bytes {
        self.written.bytes += chunk.len() as u64;
        chunk.into()
    }
}

/// A record as NDJSON has it.
#[derive(Serialize)]
struct Line<'a> {
    user_id: uuid::Uuid,
    occurred_at: String,
    event_id: uuid::Uuid,
    model: &'a str,
    input_tokens: i64,
    output_tokens: i64,
    cached_input_tokens: i64,
    cache_write_tokens: i64,
    reasoning_tokens: i64,
    total_tokens: i64,
    request_id: &'a str,
    labels: &'a Labels,
    recorded_at: String,
}

fn write_record(
    record: &UsageRecord,
    format: ExportFormat,
    to: &mut Vec<u8>,
) -> std::result::Result<(), serde_json::Error> {
    match format {
        ExportFormat::Csv => write_csv(record, to),
        ExportFormat::Ndjson => write_json(record, to),
    }
}

fn write_json(
    record: &UsageRecord,
    to: &mut Vec<u8>,
) -> std::result::Result<(), serde_json::Error> {
    let (event, tokens) = (&record.event, record.event.tokens);
    let line = Line {
        user_id: event.user_id.0,
        occurred_at: time(event.occurred_at),
        event_id: event.event_id.0,
        model: event.model.as_str(),
        input_tokens: tokens.input,
        output_tokens: tokens.output,
        cached_input_tokens: tokens.cached_input,
        cache_write_tokens: tokens.cache_write,
        reasoning_tokens: tokens.reasoning,
        total_tokens: tokens.total(),
        request_id: &event.request_id,
        labels: &event.labels,
        recorded_at: time(record.recorded_at),
    };
    serde_json::to_writer(&mut *to, &line)?;
    to.push(b'\n');
    Ok(())
}

fn write_csv(record: &UsageRecord, to: &mut Vec<u8>) -> std::result::Result<(), serde_json::Error> {
    let (event, tokens) = (&record.event, record.event.tokens);
    // Ids, times and numbers need neither quotes nor a guard.
    let plain = |to: &mut Vec<u8>, value: &dyn std::fmt::Display| {
        write!(to, "{value},").expect("memory takes whatever is written");
    };
    plain(to, &event.user_id);
    plain(to, &time(event.occurred_at));
    plain(to, &event.event_id);
    quote(guarded(event.model.as_str()), to);
    to.push(b',');
    for count in [
        tokens.input,
        tokens.output,
        tokens.cached_input,
        tokens.cache_write,
        tokens.reasoning,
        tokens.total(),
    ] {
        plain(to, &count);
    }
    quote(guarded(&event.request_id), to);
    to.push(b',');
    // Begins with a brace, which is no formula.
    quote(serde_json::to_string(&event.labels)?, to);
    to.push(b',');
    to.extend_from_slice(time(record.recorded_at).as_bytes());
    to.extend_from_slice(b"\r\n");
    Ok(())
}

/// Keeps spreadsheets from taking a value for a formula (OWASP, CSV Injection), so that it can be
/// undone: an apostrophe in front of values that begin with a sign of a formula or an apostrophe.
fn guarded(value: &str) -> String {
    let guard = if value.starts_with(['=', '+', '-', '@', '\t', '\r', '\'']) {
        "'"
    } else {
        ""
    };
    format!("{guard}{value}")
}

/// Writes a field (RFC 4180 §2, 5 to 7).
fn quote(value: String, to: &mut Vec<u8>) {
    if value.contains(['"', ',', '\r', '\n']) {
        to.push(b'"');
        to.extend_from_slice(value.replace('"', "\"\"").as_bytes());
        to.push(b'"');
    } else {
        to.extend_from_slice(value.as_bytes());
    }
}

fn time(instant: DateTime<Utc>) -> String {
    instant.to_rfc3339_opts(SecondsFormat::Micros, true)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::{EventId, TokenCounts, UsageEvent};

    fn record(model: &str, request_id: &str, labels: Labels) -> UsageRecord {
        let at = DateTime::from_timestamp(1_800_000_000, 1_000).expect("in range");
        let event = UsageEvent {
            event_id: EventId::new(),
            occurred_at: at,
            user_id: UserId::new(),
            model: model.parse().expect("a model"),
            tokens: TokenCounts {
                input: 1,
                output: TokenCounts::MAX,
                ..TokenCounts::default()
            },
            request_id: request_id.to_owned(),
            labels,
        };
        UsageRecord {
            event,
            recorded_at: at,
        }
    }

    fn written(record: &UsageRecord, format: ExportFormat) -> String {
        let mut line = Vec::new();
        write_record(record, format, &mut line).expect("written");
        String::from_utf8(line).expect("UTF-8")
    }

    /// Reads the fields of one line as RFC 4180 has it.
    fn parse(line: &str) -> Vec<String> {
        let line = line.strip_suffix("\r\n").expect("a line");
        let (mut fields, mut chars) = (vec![String::new()], line.chars().peekable());
        let mut quoted = false;
        while let Some(c) = chars.next() {
            let field = fields.last_mut().expect("one at least");
            match c {
                '"' if quoted && chars.peek() == Some(&'"') => field.extend(chars.next()),
                '"' => quoted = !quoted,
                ',' if !quoted => fields.push(String::new()),
                c => field.push(c),
            }
        }
        assert!(!quoted, "{line}");
        fields
    }

    #[test]
    fn what_looks_like_a_formula_is_guarded() {
        for formula in [
            "=1+1",
            "+1",
            "-1",
            "@SUM(A1)",
            "'quoted",
            "=HYPERLINK(\"x\",\"y\")",
        ] {
            let fields = parse(&written(
                &record(formula, formula, Labels::new()),
                ExportFormat::Csv,
            ));
            assert_eq!(fields[3], format!("'{formula}"));
            assert_eq!(fields[10], format!("'{formula}"));
        }
    }

    #[test]
    fn the_largest_record_fits_half_a_chunk() {
        // A control character is six bytes of JSON.
        let label = |n: u8| {
            let key: String = [char::from(b'a' + n)]
                .into_iter()
                .chain(['\u{1}'; 63])
                .collect();
            (key, "\u{1}".repeat(256))
        };
        let largest = record(
            &"\"".repeat(128),
            &"\"".repeat(128),
            (0..16).map(label).collect(),
        );
        for format in [ExportFormat::Csv, ExportFormat::Ndjson] {
            assert!(written(&largest, format).len() <= CHUNK_BYTES / 2);
        }
    }

    proptest! {
        #[test]
        fn every_record_can_be_read_back(
            model in "[!-~]{1,20}",
            request_id in "[!-~]{0,20}",
            labels in prop::collection::btree_map("\\PC{1,8}", any::<String>(), 0..4),
        ) {
            let record = record(&model, &request_id, labels.clone());
            let unguarded = |text: &str| text.strip_prefix('\'').unwrap_or(text).to_owned();
            let fields = parse(&written(&record, ExportFormat::Csv));
            prop_assert_eq!(fields.len(), COLUMNS.split(',').count());
            prop_assert_eq!(unguarded(&fields[3]), &*model);
            prop_assert_eq!(unguarded(&fields[10]), &*request_id);
            prop_assert!(!fields[3].starts_with(['=', '+', '-', '@']));
            prop_assert_eq!(serde_json::from_str::<Labels>(&fields[11]).expect("JSON"), labels.clone());
            prop_assert_eq!(&*fields[9], "1000000000001");

            let line = written(&record, ExportFormat::Ndjson);
            prop_assert_eq!(line.matches('\n').count(), 1);
            let object: serde_json::Value = serde_json::from_str(&line).expect("JSON");
            prop_assert_eq!(&object["model"], &model);
            prop_assert_eq!(&object["request_id"], &request_id);
            prop_assert_eq!(&object["labels"], &serde_json::to_value(labels).expect("JSON"));
            let keys: Vec<String> = COLUMNS.split(',').map(str::to_owned).collect();
            for key in keys {
                prop_assert!(!object[&key].is_null(), "{}", key);
                let quoted = format!("\"{key}\":");
                prop_assert!(line.contains(&quoted));
            }
        }
    }
}
