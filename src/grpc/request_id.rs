//! The name of a call in logs, errors and the audit trail.

use std::{
    array,
    cell::Cell,
    hash::{BuildHasher as _, RandomState},
};

use http::{HeaderMap, HeaderName, HeaderValue};

pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

thread_local! {
    /// What this thread's ids begin with, and how many it has made: no two threads or replicas
    /// share a beginning, and none waits for another.
    static IDS: Cell<(Digits, u64)> = Cell::new((digits(RandomState::new().hash_one(())), 0));
}

type Digits = [u8; 16];

/// The caller's request id when it is sane, a new one otherwise. Always printable ASCII.
pub(super) fn of(headers: &HeaderMap) -> HeaderValue {
    headers
        .get(REQUEST_ID)
        .filter(|id| is_sane(id.as_bytes()))
        .map_or_else(new, HeaderValue::clone)
}

fn is_sane(id: &[u8]) -> bool {
    (1..=128).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic)
}

/// 32 hexadecimal digits, as long as a trace id (W3C Trace Context §3.2.2.3).
fn new() -> HeaderValue {
    let (beginning, count) = IDS.get();
    IDS.set((beginning, count + 1));
    let id = [beginning, digits(count)];
    let mut id = HeaderValue::from_bytes(id.as_flattened()).expect("hexadecimal digits");
    // It comes but once: keeps it out of the tables of header compression (RFC 7541 §6.2.3).
    id.set_sensitive(true);
    id
}

fn digits(number: u64) -> Digits {
    array::from_fn(|index| b"0123456789abcdef"[(number >> (60 - 4 * index) & 0xf) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_taken_when_sane_and_made_otherwise() {
        let of = |id: &str| {
            let value = HeaderValue::from_str(id).expect("ASCII");
            super::of(&HeaderMap::from_iter([(REQUEST_ID, value)]))
        };
        assert_eq!(of("abc-123"), "abc-123");
        for bad in ["", "with space", &"x".repeat(129)] {
            let made = of(bad);
            assert_ne!(made, *bad);
            assert_eq!(made.len(), 32);
        }
    }

    #[test]
    fn numbers_are_hexadecimal_digits() {
        for number in [0, 0x0123_4567_89ab_cdef, u64::MAX] {
            assert_eq!(digits(number), *format!("{number:016x}").as_bytes());
        }
    }

    #[test]
    fn no_two_made_ids_are_alike() {
        let make = || (0..1000).map(|_| new()).collect::<Vec<_>>();
        let other = std::thread::spawn(make).join().expect("made");
        let mut all = [make(), other].concat();
        all.sort_unstable_by(|a, b| a.as_bytes().cmp(b.as_bytes()));
        all.dedup();
        assert_eq!(all.len(), 2000);
    }
}
