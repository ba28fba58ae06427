//! Rows of a file: CSV with a header, or a JSON object a line.

use std::{
    fmt,
    fs::File,
    io::{self, BufRead, BufReader, Read as _},
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use anyhow::{Context as _, bail};
use csv::ByteRecord;
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::Value;

use super::values::{COLUMNS, Values, row};
use crate::{auth::ImportRow, model::Violation};

/// Longer ones are no rows: a quote that is not closed, or no text at all.
const MAX_ROW_BYTES: u64 = 64 * 1024;

/// Read at once.
const BUFFER_BYTES: usize = 8 * 1024;

/// A row of a file as far as it could be read.
pub(super) enum Read {
    Row(Box<ImportRow>),
    /// Its line, and what is wrong with it.
    Broken(u64, Violation),
}

/// A file under way. Holds one row at a time.
pub(super) struct Rows {
    from: From,
    size: Option<u64>,
    /// Device and inode, of a file.
    id: Option<(u64, u64)>,
    so_far: Arc<SoFar>,
    /// Whoever writes it may be cut short.
    is_stdin: bool,
    line: u64,
}

enum From {
    Csv {
        reader: Box<csv::Reader<Counted>>,
        record: ByteRecord,
        /// The place in [`COLUMNS`] of each column.
        columns: Vec<usize>,
    },
    Jsonl(Box<BufReader<Counted>>),
}

impl Rows {
    /// Opens a file, or standard input, and reads the header of CSV.
    pub(super) fn open(path: Option<&Path>, is_jsonl: bool) -> anyhow::Result<Self> {
        let so_far = Arc::new(SoFar::default());
        let cannot = || match path {
            Some(path) => format!("cannot read {}", path.display()),
            None => "cannot read standard input".to_owned(),
        };
        let file = match path {
            Some(path) => File::open(path),
            None => io::stdin().as_fd().try_clone_to_owned().map(File::from),
        };
        let file = file.with_context(cannot)?;
        let data = file.metadata().with_context(cannot)?;
        let size = data.is_file().then_some(data.len());
        let counted = Counted {
            inner: Box::new(file),
            so_far: so_far.clone(),
        };
        let from = match is_jsonl {
            true => From::Jsonl(Box::new(BufReader::new(counted))),
            false => {
                let mut reader = csv_reader(counted);
                let columns = columns(reader.byte_headers().context("cannot read the header")?)?;
                From::Csv {
                    reader,
                    record: ByteRecord::new(),
                    columns,
                }
            }
        };
        Ok(Self {
            from,
            size,
            id: data.is_file().then(|| (data.dev(), data.ino())),
            so_far,
            is_stdin: path.is_none(),
            line: 0,
        })
    }

    /// Whether a path leads to the file that is read.
    pub(super) fn is_of(&self, path: &Path) -> bool {
        let data = path.metadata().ok();
        data.is_some_and(|data| self.id == Some((data.dev(), data.ino())))
    }

    /// Bytes in all, of a file.
    pub(super) fn size(&self) -> Option<u64> {
        self.size
    }

    /// Bytes read.
    pub(super) fn position(&self) -> u64 {
        self.so_far.read.load(Ordering::Relaxed)
    }

    /// Of the row read last.
    pub(super) fn line(&self) -> u64 {
        self.line
    }

    /// The next row; `None` at the end.
    ///
    /// # Errors
    /// When the file cannot be read any more.
    pub(super) fn next(&mut self) -> anyhow::Result<Option<Read>> {
        let values = match &mut self.from {
            From::Csv {
                reader,
                record,
                columns,
            } => {
                let next = next_record(reader, record, &self.so_far);
                let line = next.with_context(|| cannot_go_on(self.line))?;
                let Some(line) = line else {
                    return Ok(None);
                };
                self.line = line;
                of_record(record, columns)
            }
            From::Jsonl(reader) => match of_next_line(reader, &mut self.line)? {
                Some(values) => values,
                None => return Ok(None),
            },
        };
        // A row is read beyond its line end only when it has none.
        let values = match self.is_stdin && self.so_far.has_ended.load(Ordering::Relaxed) {
            true => Err("has no line end: was the input cut short?".into()),
            false => values,
        };
        Ok(Some(match values {
            Ok(values) => Read::Row(Box::new(row(self.line, values))),
            Err(violation) => Read::Broken(self.line, violation),
        }))
    }
}

fn csv_reader(from: Counted) -> Box<csv::Reader<Counted>> {
    let mut builder = csv::ReaderBuilder::new();
    // With its own terminator the reader would not tell a CR from an LF, which lines are counted by.
    builder
        .flexible(true)
        .terminator(csv::Terminator::Any(b'\n'));
    builder.buffer_capacity(BUFFER_BYTES);
    from.so_far.row_begins_at(0);
    Box::new(builder.from_reader(from))
}

/// Reads a record that is no blank line; answers the line that it begins in, or `None` at the end.
fn next_record(
    reader: &mut csv::Reader<Counted>,
    record: &mut ByteRecord,
    so_far: &SoFar,
) -> csv::Result<Option<u64>> {
    loop {
        so_far.row_begins_at(reader.position().byte());
        if !reader.read_byte_record(record)? {
            return Ok(None);
        }
        let is_blank = record.len() == 1 && record[0] == *b"\r";
        if !is_blank {
            let inner = record.as_slice().iter().filter(|&&b| b == b'\n').count() as u64;
            // Behind the record's line end, if it has one.
            let behind = u64::from(!so_far.has_ended.load(Ordering::Relaxed));
            return Ok(Some(reader.position().line() - inner - behind));
        }
    }
}

fn cannot_go_on(line: u64) -> String {
    format!("cannot read the file behind line {line}")
}

/// What each column is.
fn columns(header: &ByteRecord) -> anyhow::Result<Vec<usize>> {
    let mut columns = Vec::new();
    if header.as_slice().trim_ascii_end().contains(&b'\r') {
        bail!("lines must end with LF or CRLF");
    }
    for (place, name) in header.iter().enumerate() {
        let name = String::from_utf8_lossy(name);
        // As spreadsheets save it.
        let name = name.trim_start_matches('\u{feff}').trim();
        let known = COLUMNS.iter().position(|names| names.contains(&name));
        // To pass a column over might lose everybody's passwords.
        let Some(column) = known else {
            let known: Vec<&str> = COLUMNS.iter().map(|names| names[0]).collect();
            let is_name = |b: u8| b.is_ascii_alphabetic() || b == b'_';
            // Without a header the first row stands here, and may hold anything.
            if !(1..=32).contains(&name.len()) || !name.bytes().all(is_name) {
                bail!("column {} is unknown; is there a header?", place + 1);
            }
            bail!(
                "the column {name:?} is unknown; there may be: {}",
                known.join(", ")
            );
        };
        if columns.contains(&column) {
            bail!("the column {} is there twice", COLUMNS[column][0]);
        }
        columns.push(column);
    }
    for needed in ["email", "username"] {
        if !columns.iter().any(|&column| COLUMNS[column][0] == needed) {
            bail!("there is no column {needed}");
        }
    }
    Ok(columns)
}

fn of_record(record: &ByteRecord, columns: &[usize]) -> Result<Values, Violation> {
    if record.len() != columns.len() {
        return Err(format!("has {} values for {} columns", record.len(), columns.len()).into());
    }
    if record.as_slice().len() as u64 > MAX_ROW_BYTES {
        return Err("is too long: is a quote missing?".into());
    }
    let mut values = Values::default();
    for (place, (&column, value)) in columns.iter().zip(record).enumerate() {
        // That of CRLF.
        let line_end = b"\r".as_slice();
        let value = match place + 1 == columns.len() {
            true => value.strip_suffix(line_end).unwrap_or(value),
            false => value,
        };
        let value = str::from_utf8(value).map_err(|_| "is not UTF-8")?;
        value.clone_into(&mut values[column]);
    }
    Ok(values)
}

/// Reads a line that is not empty; `None` at the end.
fn of_next_line(
    reader: &mut impl BufRead,
    number: &mut u64,
) -> anyhow::Result<Option<Result<Values, Violation>>> {
    loop {
        let mut line = Vec::new();
        let read = reader
            .by_ref()
            .take(MAX_ROW_BYTES)
            .read_until(b'\n', &mut line);
        if read.context("cannot read the file")? == 0 {
            return Ok(None);
        }
        *number += 1;
        if line.len() as u64 == MAX_ROW_BYTES && line.last() != Some(&b'\n') {
            reader.skip_until(b'\n').context("cannot read the file")?;
            return Ok(Some(Err("is too long".into())));
        }
        // As spreadsheets and editors save it.
        let bom = "\u{feff}".as_bytes();
        let line = match *number {
            1 => line.strip_prefix(bom).unwrap_or(&line),
            _ => &line,
        };
        if !line.trim_ascii().is_empty() {
            return Ok(Some(of_object(line)));
        }
    }
}

/// Of an object, all: a map would keep the last of each name.
struct Members(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Members;

            fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
                to.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = object.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        from.deserialize_map(Object)
    }
}

fn of_object(line: &[u8]) -> Result<Values, Violation> {
    let Members(members) = serde_json::from_slice(line).map_err(|_| "is not a JSON object")?;
    let mut values = Values::default();
    let mut known = [false; COLUMNS.len()];
    for (name, value) in members {
        let column = COLUMNS.iter().position(|names| names.contains(&&*name));
        // Not by its name: that may be anything.
        let column = column.ok_or("has a member that is unknown")?;
        if std::mem::replace(&mut known[column], true) {
            return Err(format!("has {} twice", COLUMNS[column][0]).into());
        }
        values[column] = match value {
            Value::Null => continue,
            Value::String(text) => text,
            Value::Bool(is_so) => is_so.to_string(),
            _ => return Err(format!("has a {} that is no text", COLUMNS[column][0]).into()),
        };
    }
    Ok(values)
}

/// What is known of a file under way.
#[derive(Default)]
struct SoFar {
    /// Bytes.
    read: AtomicU64,
    has_ended: AtomicBool,
    /// Beyond so many bytes the row under way is too long; 0: somebody else sees to that.
    limit: AtomicU64,
}

impl SoFar {
    fn row_begins_at(&self, place: u64) {
        let limit = place + MAX_ROW_BYTES + BUFFER_BYTES as u64;
        self.limit.store(limit, Ordering::Relaxed);
    }
}

/// Counts what is read.
struct Counted {
    inner: Box<dyn io::Read + Send>,
    so_far: Arc<SoFar>,
}

impl io::Read for Counted {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let limit = self.so_far.limit.load(Ordering::Relaxed);
        if limit > 0 && self.so_far.read.load(Ordering::Relaxed) >= limit {
            // The reader would hold all of it.
            return Err(io::Error::other(
                "a row is longer than 64 KiB: is a quote missing?",
            ));
        }
        let read = self.inner.read(to)?;
        self.so_far.read.fetch_add(read as u64, Ordering::Relaxed);
        let has_ended = read == 0 && !to.is_empty();
        self.so_far.has_ended.store(has_ended, Ordering::Relaxed);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_names_each_column_once_and_none_that_is_unknown() {
        let read = |names: &[&str]| columns(&ByteRecord::from(names.to_vec()));
        assert_eq!(
            read(&["\u{feff}id", "email", "username"]).expect("right"),
            [0, 1, 2]
        );
        for names in [
            &["email", "username", "password"][..],
            &["email", "username", "id", "user_id"],
            &["email"],
            &["username"],
            &[],
        ] {
            assert!(read(names).is_err(), "{names:?}");
        }
    }

    #[test]
    fn a_first_row_that_is_no_header_is_not_told() {
        for secret in ["ada@example.com", "$2b$04$abc", "", "36", &"a".repeat(33)] {
            let header = ByteRecord::from(vec!["email", secret]);
            let error = columns(&header).expect_err("unknown").to_string();
            assert_eq!(error, "column 2 is unknown; is there a header?");
        }
    }

    /// Reads all of a CSV file: the lines of its rows and their addresses.
    fn lines(text: &str) -> Vec<(u64, String)> {
        let so_far = Arc::new(SoFar::default());
        let mut reader = csv_reader(Counted {
            inner: Box::new(io::Cursor::new(text.to_owned())),
            so_far: so_far.clone(),
        });
        let columns = columns(reader.byte_headers().expect("right")).expect("right");
        let (mut record, mut lines) = (ByteRecord::new(), Vec::new());
        while let Some(line) = next_record(&mut reader, &mut record, &so_far).expect("right") {
            let values = of_record(&record, &columns).expect("right");
            lines.push((line, values[1].clone()));
        }
        lines
    }

    #[test]
    fn rows_are_known_by_the_line_they_begin_in_whatever_ends_it() {
        let text = "username,email\na,1\n\n\nb,4\n\"c\nc\nc\",\"5\"\nd,8\n\n\"e\",\"10\"";
        let expected = [(2, "1"), (5, "4"), (6, "5"), (9, "8"), (11, "10")];
        let expected = expected.map(|(line, email)| (line, email.to_owned()));
        for end in ["", "\n", "\n\n"] {
            let text = format!("{text}{end}");
            assert_eq!(lines(&text), expected);
            assert_eq!(lines(&text.replace('\n', "\r\n")), expected);
        }
        // Longer than what is read at once.
        for end in ["\n", "\r\n"] {
            let rows = (2..2000).map(|line| format!("someone,{line}{end}"));
            let text = format!("username,email{end}{}", rows.collect::<String>());
            let lines = lines(&text);
            assert_eq!(lines.len(), 1998);
            assert!(lines.iter().all(|(line, email)| line.to_string() == *email));
        }
        let header = ByteRecord::from(vec!["email", "username\rada@example.com", "ada"]);
        assert!(columns(&header).is_err());
    }

    #[test]
    fn a_quote_that_is_missing_does_not_read_all_of_the_file() {
        for head in ["email,username\na,b\nc,\"d\n", "email,username\",\"x\n"] {
            let so_far = Arc::new(SoFar::default());
            let endless = io::Cursor::new(head.to_owned()).chain(io::repeat(b'x'));
            let mut reader = csv_reader(Counted {
                inner: Box::new(endless),
                so_far: so_far.clone(),
            });
            let mut record = ByteRecord::new();
            let error = loop {
                match next_record(&mut reader, &mut record, &so_far) {
                    Ok(line) => assert_eq!(line, Some(2)),
                    Err(error) => break error.to_string(),
                }
            };
            assert!(error.contains("is a quote missing?"), "{error}");
            let read = so_far.read.load(Ordering::Relaxed);
            assert!(read < 2 * MAX_ROW_BYTES, "{read}");
        }
    }

    #[test]
    fn a_line_is_an_object_of_known_members() {
        let read = |text: &str| of_object(text.as_bytes());
        let values = read(r#"{"id": null, "email": "a@b.co", "is_active": false}"#).expect("right");
        assert_eq!(
            (&*values[0], &*values[1], &*values[7]),
            ("", "a@b.co", "false")
        );
        for text in [
            "",
            "[]",
            "{",
            r#"{"password": "x"}"#,
            r#"{"id": "a", "user_id": "b"}"#,
            r#"{"email": 7}"#,
            r#"{"email": "a@b.co", "email": "c@d.co"}"#,
            r#"{"email": null, "email": "c@d.co"}"#,
        ] {
            assert!(read(text).is_err(), "{text}");
        }
        let mut marked = io::Cursor::new("\u{feff}{}\n\u{feff}{}\n");
        let mut line = 0;
        for is_right in [true, false] {
            let read = of_next_line(&mut marked, &mut line).expect("right");
            assert_eq!(read.expect("a line").is_ok(), is_right);
        }
        let mut input = io::Cursor::new([&[b'x'; 70_000][..], b"\n\n{}\n"].concat());
        let mut line = 0;
        assert!(
            of_next_line(&mut input, &mut line)
                .expect("right")
                .expect("right")
                .is_err()
        );
        assert_eq!(line, 1);
        assert!(
            of_next_line(&mut input, &mut line)
                .expect("right")
                .expect("right")
                .is_ok()
        );
        assert_eq!(line, 3);
        assert!(
            of_next_line(&mut input, &mut line)
                .expect("right")
                .is_none()
        );
    }
}
