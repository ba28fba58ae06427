//! The name of a call in logs, errors and the audit trail.

use std::{
    cell::Cell,
    hash::{BuildHasher as _, RandomState},
};

use http::{HeaderMap, HeaderName, HeaderValue};

pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

thread_local! {
    /// What this thread's ids begin with, and how many it has made: no two threads or replicas
    /// share a beginning, and none waits for another.
    static IDS: Cell<(u64, u64)> = Cell::new((RandomState::new().hash_one(()), 0));
}

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
    let number = u128::from(beginning) << 64 | u128::from(count);
    let mut digits = [0; 32];
    for (index, digit) in digits.iter_mut().enumerate() {
        *digit = b"0123456789abcdef"[(number >> (124 - 4 * index) & 0xf) as usize];
    }
    let mut id = HeaderValue::from_bytes(&digits).expect("hexadecimal digits");
    // It comes but once: keeps it out of the tables of header compression (RFC 7541 §6.2.3).
    id.set_sensitive(true);
    id
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
    fn no_two_made_ids_are_alike() {
        let make = || (0..1000).map(|_| new()).collect::<Vec<_>>();
        let other = std::thread::spawn(make).join().expect("made");
        let mut all = [make(), other].concat();
        all.sort_unstable_by(|a, b| a.as_bytes().cmp(b.as_bytes()));
        all.dedup();
        assert_eq!(all.len(), 2000);
    }
}
