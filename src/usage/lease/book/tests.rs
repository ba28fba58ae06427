use std::{collections::HashMap, time::Instant};

use uuid::Uuid;

use super::*;
use crate::{
    model::{Answer, Balance, Carried, Ending, Kind, LeaseRow, Period, operate},
    usage::lease::ModelKey,
};

const STANDING: Standing = Standing {
    now: Boot(1_000),
    fence: Boot(5_000),
    horizon: Boot(10_000),
};

fn user() -> UserId {
    UserId(Uuid::from_u128(7))
}

fn meter() -> MeterKey {
    MeterKey {
        user: user(),
        period: Period::containing(chrono::DateTime::UNIX_EPOCH),
        model: ModelKey::TOTAL,
    }
}

fn ask(request: u128, meters: &[MeterKey], tokens: Tokens) -> Ask<'_> {
    Ask {
        request: RequestKey(request),
        meters,
        tokens,
        mode: Mode::AllOrNothing,
        lasts_ms: 2_000,
    }
}

/// A book with a lease of so many tokens.
fn leased(granted: Tokens) -> Book {
    let mut book = Book::new(Bounds::default(), Pace::default());
    let short = book.reserve(&ask(0, &[meter()], granted), &STANDING);
    assert_eq!(short, Reserved::Short([Some(meter()), None]));
    let [(key, operation)] = book.operations(STANDING.now, 10)[..] else {
        panic!("one operation");
    };
    let answer = Answer {
        granted,
        remaining: Some(0),
    };
    book.answered(key, operation.number, &answer, STANDING.now);
    book
}

fn held(reserved: Reserved) -> Held {
    match reserved {
        Reserved::Held(held) => held,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_hold_is_refused_past_the_fence_and_beyond_the_horizon() {
    let mut book = leased(100);
    let late = Standing {
        now: STANDING.fence,
        ..STANDING
    };
    let refused = book.reserve(&ask(1, &[meter()], 1), &late);
    assert_eq!(refused, Reserved::Refused(Refusal::Fenced));
    let meters = [meter()];
    let long = Ask {
        lasts_ms: 9_001,
        ..ask(1, &meters, 1)
    };
    let refused = book.reserve(&long, &STANDING);
    assert_eq!(refused, Reserved::Refused(Refusal::BeyondHorizon));
}

#[test]
fn a_released_hold_is_free_only_after_its_tombstone() {
    let mut book = leased(100);
    let hold = held(book.reserve(&ask(1, &[meter()], 60), &STANDING));
    assert_eq!(book.release(hold.id), Ended::Now);
    assert_eq!(book.sight(meter()).expect("leased").free, 40);
    assert_eq!(book.tombstones(10), [(hold.id, Ending::Released)]);
    // A commit landed elsewhere first: what it used is spent, the rest is free.
    assert_eq!(book.settled(hold.id, Kind::Committed(25)), Ended::Now);
    let sight = book.sight(meter()).expect("leased");
    assert_eq!((sight.free, sight.held, sight.spent), (75, 0, 25));
    book.check();
}

#[test]
fn a_tombstone_frees_nothing_while_a_commit_is_under_way() {
    let mut book = leased(100);
    let hold = held(book.reserve(&ask(1, &[meter()], 60), &STANDING));
    book.begin_commit(hold.id);
    book.settled(hold.id, Kind::Ended(Ending::Released));
    assert_eq!(book.sight(meter()).expect("leased").free, 40);
    let outcome = Outcome::Booked {
        actual: 60,
        new: true,
    };
    assert_eq!(book.end_commit(hold.id, &[meter()], outcome), Ended::Now);
    assert_eq!(book.sight(meter()).expect("leased").spent, 60);
}

#[test]
fn a_commit_repeated_while_it_is_under_way_is_spent_once() {
    let mut book = leased(100);
    let hold = held(book.reserve(&ask(1, &[meter()], 60), &STANDING));
    book.begin_commit(hold.id);
    book.begin_commit(hold.id);
    // The one that found the record is answered before the one that made it.
    for new in [false, true] {
        let outcome = Outcome::Booked { actual: 25, new };
        assert_eq!(book.end_commit(hold.id, &[meter()], outcome), Ended::Now);
        let sight = book.sight(meter()).expect("leased");
        assert_eq!((sight.free, sight.held, sight.spent), (75, 0, 25));
        book.check();
    }
    assert_eq!((book.holds(), book.release(hold.id)), (0, Ended::Unknown));
}

#[test]
fn requests_are_told_apart_by_the_whole_key() {
    const REQUESTS: u128 = 500;
    let mut book = leased(2 * REQUESTS as Tokens);
    let requests = || (0..REQUESTS).map(|high| high << 32 | 7);
    let reserve =
        |book: &mut Book, request| held(book.reserve(&ask(request, &[meter()], 1), &STANDING));
    let ids: Vec<_> = requests()
        .map(|request| reserve(&mut book, request))
        .collect();
    assert!(ids.iter().all(|held| !held.replay));
    let ended = ids[3].id;
    book.release(ended);
    book.settled(ended, Kind::Ended(Ending::Released));
    for (request, held) in requests().zip(&ids) {
        let (again, is_live) = (reserve(&mut book, request), held.id != ended);
        assert_eq!((again.replay, again.id == held.id), (is_live, is_live));
    }
    book.check();
}

#[test]
fn open_holds_stay_within_the_allowance_of_one_outage() {
    let mut book = Book::new(Bounds::default(), Pace::default());
    let now = STANDING.now;
    let first = held(book.reserve_open(&ask(1, &[], 60), user(), 100, now));
    let again = held(book.reserve_open(&ask(1, &[], 60), user(), 100, now));
    assert!(again.replay && again.id == first.id);
    // Where it was committed is not known: its end gives nothing back.
    book.release(first.id);
    book.settled(first.id, Kind::Ended(Ending::Released));
    let refused = book.reserve_open(&ask(2, &[], 41), user(), 100, now);
    assert_eq!(refused, Reserved::Refused(Refusal::Allowance));
    let last = held(book.reserve_open(&ask(3, &[], 40), user(), 100, now));
    // It may still be committed.
    book.outage_ended();
    let refused = book.reserve_open(&ask(4, &[], 1), user(), 100, now);
    assert_eq!(refused, Reserved::Refused(Refusal::Allowance));
    book.settled(last.id, Kind::Committed(40));
    book.outage_ended();
    held(book.reserve_open(&ask(4, &[], 100), user(), 100, now));
    book.check();
}

#[test]
fn a_chunk_larger_than_what_is_left_is_not_asked_for_again_and_again() {
    const LIMIT: Tokens = 1_000;
    let mut book = Book::new(Bounds::default(), Pace::default());
    let (mut row, mut operations) = (None, 0);
    let meters = [meter()];
    assert!(matches!(
        book.reserve(&ask(0, &meters, 1), &STANDING),
        Reserved::Short(_)
    ));
    while let [(key, operation)] = book.operations(STANDING.now, 10)[..] {
        let balance = Balance {
            limit: Some(LIMIT),
            committed: 0,
            leased: row.map_or(0, |row: LeaseRow| row.granted),
        };
        let Carried::Out { lease, answer, .. } = operate(&balance, row, &operation, 2) else {
            panic!("{operation:?}");
        };
        row = Some(lease);
        book.answered(key, operation.number, &answer, STANDING.now);
        operations += 1;
        assert!(operations < 100, "it never ends");
    }
    // What is left stays for others until somebody asks here.
    assert_eq!(
        (operations, book.sight(meter()).expect("leased").free),
        (1, LIMIT / 4)
    );
}

/// Users of a gateway that asks before and charges after are only looked at.
#[test]
fn a_lease_that_is_looked_at_is_in_use_while_it_has_enough() {
    // More than a chunk, or more would be asked for.
    const LEASED: Tokens = 10_000;
    let idle_after = Pace::default().idle_after_ms;
    let half = Standing {
        now: STANDING.now.plus(idle_after / 2),
        fence: STANDING.fence.plus(idle_after),
        horizon: STANDING.horizon.plus(idle_after),
    };
    let meters = [meter()];
    let look = |tokens| Ask {
        mode: Mode::LookOnly,
        ..ask(1, &meters, tokens)
    };
    let given_back = |book: &mut Book, now: Boot| -> Tokens {
        book.sweep(now, 1);
        let operations = book.operations(now, 10);
        operations.iter().map(|(_, sent)| sent.give_back).sum()
    };
    let mut book = leased(LEASED);
    assert_eq!(book.reserve(&look(LEASED), &half), Reserved::Enough);
    assert_eq!(given_back(&mut book, STANDING.now.plus(idle_after)), 0);
    assert_eq!(given_back(&mut book, half.now.plus(idle_after)), LEASED);

    let mut book = leased(LEASED);
    let short = book.reserve(&look(LEASED + 1), &half);
    assert_eq!(short, Reserved::Short([Some(meter()), None]));
    let (key, operation) = book.operations(half.now, 10)[0];
    let answer = Answer {
        granted: LEASED,
        remaining: Some(0),
    };
    book.answered(key, operation.number, &answer, half.now);
    assert_eq!(given_back(&mut book, STANDING.now.plus(idle_after)), LEASED);
}

/// More than fit one chunk, of all lengths, extended, ended, and with commits under way.
#[test]
fn a_hold_expires_in_the_next_round_of_sweeps_and_not_before() {
    const PARTS: u32 = 4;
    const TICK_MS: u64 = 100;
    let standing = |now| Standing {
        now,
        fence: Boot(100_000),
        horizon: Boot(100_000),
    };
    let mut book = leased(1 << 40);
    let meters = [meter()];
    let mut live = HashMap::new();
    let mut begun = Vec::new();
    let mut expired = 0;
    for (round, now) in (0..200).zip((1..).map(|tick| Boot(1_000 + tick * TICK_MS))) {
        // None comes in the last half: all there are end.
        for number in 0..if round < 100 { 40 } else { 0 } {
            let request = round * 1_000 + number;
            let lasts_ms = 300 + (request as u64 * 7_919) % 3_000;
            let ask = Ask {
                lasts_ms,
                ..ask(request, &meters, 1)
            };
            let hold = held(book.reserve(&ask, &standing(now)));
            live.insert(hold.id, hold.expires);
            match number % 5 {
                0 => {
                    let extended = book.extend(hold.id, 2 * lasts_ms, &standing(now));
                    live.insert(hold.id, extended.expect("it is live"));
                }
                1 => {
                    book.release(hold.id);
                    live.remove(&hold.id);
                }
                2 => {
                    book.begin_commit(hold.id);
                    begun.push((hold.id, now.plus(1_500)));
                }
                _ => {}
            }
        }
        book.sweep(now, PARTS);
        for (id, ending) in book.tombstones(usize::MAX) {
            book.settled(id, Kind::Ended(ending));
            if ending == Ending::Expired {
                let expires = live.remove(&id).expect("it was live");
                assert!(expires <= now && !begun.iter().any(|(of, _)| *of == id));
                expired += 1;
            }
        }
        let over = now.since(Boot(u64::from(PARTS) * TICK_MS));
        let is_late = |(id, expires): (&HoldId, &Boot)| {
            expires.0 <= over && !begun.iter().any(|(of, _)| of == id)
        };
        assert!(!live.iter().any(is_late), "{now:?}");
        begun.retain(|(id, until)| {
            let is_over = *until <= now;
            if is_over {
                book.end_commit(*id, &meters, Outcome::Refused);
                // A round from now on.
                let expires = live.get_mut(id).expect("nothing ended it");
                *expires = now.max(*expires);
            }
            !is_over
        });
    }
    assert_eq!((live.len(), expired), (0, 100 * 40 * 4 / 5));
    assert_eq!(book.holds(), 0);
    book.check();
}

#[test]
#[ignore = "a measure: prints nanoseconds"]
fn measures_a_reservation_and_its_commit() {
    const CALLS: u128 = 1_000_000;
    let mut book = leased(1 << 40);
    let outcome = Outcome::Booked {
        actual: 1,
        new: true,
    };
    let begun = Instant::now();
    for request in 1..=CALLS {
        let hold = held(book.reserve(&ask(request, &[meter()], 10), &STANDING));
        book.begin_commit(hold.id);
        book.end_commit(hold.id, &[meter()], outcome);
    }
    println!("{} ns", begun.elapsed().as_nanos() / CALLS);
}
