//! Messages read where they lie, and written where they leave. Of what comes with each request of somebody
//! else's traffic no field is copied, and what nobody asks for is passed over.
//!
//! It reads what encoders write. Whatever else may be valid, such as a single value that is sent twice, it
//! leaves to the generated code, and so to the long way.

use std::{fmt, io::Write as _};

use chrono::{DateTime, Utc};
use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};
use prost_types::Timestamp;

use super::convert::time;

/// The value of a field.
#[derive(Clone, Copy)]
pub(super) enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    /// Of a kind that nothing here asks for.
    Other,
}

impl<'a> Value<'a> {
    /// Of an integer. What does not fit into fewer bits is for the reader to leave.
    pub(super) fn number(self) -> Option<u64> {
        match self {
            Self::Number(number) => Some(number),
            Self::Bytes(_) | Self::Other => None,
        }
    }

    /// Of `bytes`, or of a message.
    pub(super) fn bytes(self) -> Option<&'a [u8]> {
        match self {
            Self::Bytes(bytes) => Some(bytes),
            Self::Number(_) | Self::Other => None,
        }
    }

    /// Of a `string`.
    pub(super) fn text(self) -> Option<&'a str> {
        std::str::from_utf8(self.bytes()?).ok()
    }
}

/// Gives `take` each field of a message with its number. `None` from it: it is not to be read here.
pub(super) fn read<'a>(
    mut message: &'a [u8],
    mut take: impl FnMut(u32, Value<'a>) -> Option<()>,
) -> Option<()> {
    while !message.is_empty() {
        let (number, wire_type) = decode_key(&mut message).ok()?;
        let value = match wire_type {
            WireType::Varint => Value::Number(decode_varint(&mut message).ok()?),
            WireType::LengthDelimited => {
                let bytes = usize::try_from(decode_varint(&mut message).ok()?).ok()?;
                let (value, rest) = message.split_at_checked(bytes)?;
                message = rest;
                Value::Bytes(value)
            }
            WireType::ThirtyTwoBit => {
                message = message.get(4..)?;
                Value::Other
            }
            WireType::SixtyFourBit => {
                message = message.get(8..)?;
                Value::Other
            }
            WireType::StartGroup | WireType::EndGroup => return None,
        };
        take(number, value)?;
    }
    Some(())
}

/// Keeps the value of a field that comes once.
pub(super) fn once<T>(field: &mut Option<T>, value: Option<T>) -> Option<()> {
    if field.is_some() {
        return None;
    }
    *field = Some(value?);
    Some(())
}

/// The first two fields, as an entry of `map<string, string>` has them.
pub(super) fn pair(message: &[u8]) -> Option<(&str, &str)> {
    let (mut key, mut value) = (None, None);
    read(message, |number, sent| match number {
        1 => once(&mut key, sent.text()),
        2 => once(&mut value, sent.text()),
        _ => Some(()),
    })?;
    Some((key.unwrap_or_default(), value.unwrap_or_default()))
}

/// Writes a message behind what is there. Its fields are to come in the order of their numbers; then it
/// reads as that of the generated code, byte by byte: what has its default is left out.
pub(super) struct Writer<'a>(&'a mut Vec<u8>);

impl<'a> Writer<'a> {
    pub(super) fn new(bytes: &'a mut Vec<u8>) -> Self {
        Self(bytes)
    }

    /// Of an integer, or a truth.
    pub(super) fn number(&mut self, number: u32, value: impl Into<i64>) {
        let value = value.into();
        if value != 0 {
            encode_key(number, WireType::Varint, self.0);
            encode_varint(value.cast_unsigned(), self.0);
        }
    }

    pub(super) fn text(&mut self, number: u32, value: &str) {
        if !value.is_empty() {
            encode_key(number, WireType::LengthDelimited, self.0);
            encode_varint(value.len() as u64, self.0);
            self.0.extend_from_slice(value.as_bytes());
        }
    }

    /// Of what is never empty.
    pub(super) fn shown(&mut self, number: u32, value: impl fmt::Display) {
        self.message(number, |out| {
            write!(out.0, "{value}").expect("memory takes all");
        });
    }

    pub(super) fn message(&mut self, number: u32, write: impl FnOnce(&mut Writer<'_>)) {
        encode_key(number, WireType::LengthDelimited, self.0);
        let place = self.0.len();
        // Its length, which is seldom longer.
        self.0.push(0);
        write(&mut Writer(self.0));
        let len = self.0.len() - place - 1;
        match u8::try_from(len) {
            Ok(short @ ..0x80) => self.0[place] = short,
            _ => {
                let mut long = Vec::new();
                encode_varint(len as u64, &mut long);
                self.0.splice(place..=place, long);
            }
        }
    }

    pub(super) fn time(&mut self, number: u32, instant: DateTime<Utc>) {
        let Timestamp { seconds, nanos } = time(instant);
        self.message(number, |out| {
            out.number(1, seconds);
            out.number(2, nanos);
        });
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use prost_types::{Any, Duration};

    use super::*;

    #[test]
    fn fields_are_read_with_their_numbers() {
        let sent = Duration {
            seconds: -5,
            nanos: 7,
        };
        let bytes = sent.encode_to_vec();
        let mut numbers = Vec::new();
        let read = read(&bytes, |number, value| {
            numbers.push((number, value.number()? as i64));
            Some(())
        });
        assert_eq!(read, Some(()));
        assert_eq!(numbers, [(1, -5), (2, 7)]);
    }

    #[test]
    fn a_message_of_any_length_is_written_within_another() {
        for len in [0, 1, 127, 128, 20_000] {
            let inner = Any {
                type_url: "x".repeat(len),
                value: Vec::new(),
            };
            let mut bytes = b"before".to_vec();
            Writer::new(&mut bytes).message(2, |out| out.text(1, &inner.type_url));
            let outer = Any {
                type_url: String::new(),
                value: inner.encode_to_vec(),
            };
            // Bytes that are empty are left out, and a message is not.
            let whole = match len {
                0 => vec![0x12, 0],
                _ => outer.encode_to_vec(),
            };
            assert_eq!(bytes, [b"before", &whole[..]].concat());
        }
    }

    #[test]
    fn a_pair_is_read_whatever_is_left_out() {
        for (key, value) in [("k", "v"), ("", "v"), ("k", ""), ("", "")] {
            let sent = Any {
                type_url: key.to_owned(),
                value: value.into(),
            };
            assert_eq!(pair(&sent.encode_to_vec()), Some((key, value)));
        }
    }

    #[test]
    fn what_is_cut_twice_there_or_of_another_kind_is_not_read() {
        let sent = Any {
            type_url: "key".to_owned(),
            value: b"value".to_vec(),
        };
        let whole = sent.encode_to_vec();
        for end in 1..whole.len() {
            // Behind the first field.
            assert_eq!(pair(&whole[..end]).is_some(), end == 5, "{end}");
        }
        assert_eq!(pair(&[&whole[..], &whole[..5]].concat()), None);
        // A number; not UTF-8; groups; no wire type; no field number.
        for bytes in [
            &[0x08, 1][..],
            &[0x0a, 1, 0xff],
            &[0x1b],
            &[0x1c],
            &[0x0e],
            &[0x02, 0],
        ] {
            assert_eq!(pair(bytes), None, "{bytes:?}");
        }
        // Of fields that nobody asks for the length alone counts.
        let others = [0x18, 1, 0x1d, 0, 0, 0, 0, 0x19, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(pair(&others), Some(("", "")));
        assert_eq!(pair(&others[..others.len() - 1]), None);
    }
}
