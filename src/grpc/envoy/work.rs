//! What the descriptors of a call are to have done, together and in order.

use super::descriptor::{self, Ask, Hold};
use crate::{error::Error, proto::envoy::extensions::common::ratelimit::v3::RateLimitDescriptor};

/// What is to be done, by the places of the descriptors that ask for it.
pub(super) struct Work {
    pub(super) wrong: Vec<(usize, Error)>,
    pub(super) asks: Vec<(Vec<usize>, Ask)>,
}

impl Work {
    /// Reads all descriptors. The dimensions of one request are one event, and what ends the request
    /// is one with it. What was used comes first, then what is released, since that may be what others
    /// need.
    pub(super) fn of(descriptors: &[RateLimitDescriptor], hits: u32) -> Self {
        let (mut wrong, mut asks) = (Vec::new(), Vec::<(Vec<usize>, Ask)>::new());
        let mut ends = Vec::new();
        for (place, descriptor) in descriptors.iter().enumerate() {
            match descriptor::read(&descriptor.into(), hits) {
                Err(error) => wrong.push((place, error)),
                Ok(Ask::Book(of, counts)) => {
                    let same = asks.iter_mut().find_map(|(places, ask)| match ask {
                        Ask::Book(other, sum) if *other == of => Some((places, sum)),
                        _ => None,
                    });
                    match same {
                        Some((places, sum)) => {
                            places.push(place);
                            *sum += counts;
                        }
                        None => asks.push((vec![place], Ask::Book(of, counts))),
                    }
                }
                Ok(Ask::Settle(of, counts)) => ends.push((place, of, Some(counts))),
                Ok(Ask::Release(of)) => ends.push((place, of, None)),
                Ok(ask) => asks.push((vec![place], ask)),
            }
        }
        for (place, of, unless_told) in ends {
            let told = asks.iter_mut().find_map(|(places, ask)| match ask {
                Ask::Book(other, _) if other.is_same_request(&of) => Some((places, &other.hold)),
                _ => None,
            });
            match (told, unless_told) {
                // A commit ends its hold; one that fails still needs it.
                (Some((places, hold)), _) if *hold != Hold::None => places.push(place),
                (None, Some(counts)) => asks.push((vec![place], Ask::Book(of, counts))),
                _ => asks.push((vec![place], Ask::Release(of))),
            }
        }
        asks.sort_by_key(|(_, ask)| match ask {
            Ask::Book(..) | Ask::Settle(..) => 0,
            Ask::Release(_) => 1,
            Ask::Check(..) | Ask::Reserve(..) => 2,
        });
        Self { wrong, asks }
    }

    /// Whether something is to be done that must not be left undone when the gateway goes.
    pub(super) fn settles(&self) -> bool {
        let mut asks = self.asks.iter();
        asks.any(|(_, ask)| matches!(ask, Ask::Book(..) | Ask::Release(_)))
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::descriptor::{
            MISSING,
            tests::{descriptor, of_request},
        },
        *,
    };
    use crate::model::TokenCounts;

    #[test]
    fn the_dimensions_of_a_request_are_one_event_and_come_before_what_looks() {
        let work = Work::of(
            &[
                of_request("check", &[], None),
                of_request("release", &[], None),
                of_request("commit", &[("dimension", "input")], Some(3)),
                descriptor(&[], None),
                of_request("commit", &[("dimension", "output")], Some(4)),
                of_request("charge", &[], Some(5)),
            ],
            0,
        );
        assert_eq!(work.wrong.len(), 1);
        assert_eq!(work.wrong[0].0, 3);
        assert!(work.settles());
        let places: Vec<_> = work.asks.iter().map(|(places, _)| places.clone()).collect();
        assert_eq!(places, [vec![2, 4, 1], vec![5], vec![0]]);
        let counts = TokenCounts {
            input: 3,
            output: 4,
            ..TokenCounts::default()
        };
        assert!(matches!(&work.asks[0].1, Ask::Book(_, sum) if *sum == counts));
    }

    /// What is asked for, in order, and the tokens of what is booked.
    fn asked(descriptors: &[RateLimitDescriptor]) -> Vec<(Vec<usize>, Option<i64>)> {
        let asks = Work::of(descriptors, 0).asks.into_iter();
        let tokens = |ask| match ask {
            Ask::Book(_, counts) => Some(counts.total()),
            Ask::Release(_) => None,
            other => panic!("{other:?}"),
        };
        asks.map(|(places, ask)| (places, tokens(ask))).collect()
    }

    #[test]
    fn a_request_is_settled_by_what_it_used_else_by_its_estimate() {
        let settle = |status| of_request("settle", &[("status", status)], Some(1000));
        let commit = of_request("commit", &[], Some(3));
        let nothing = of_request("commit", &[], Some(0));
        let charge = of_request("charge", &[], Some(3));
        for (descriptors, expected) in [
            (vec![settle("200")], vec![(vec![0], Some(1000))]),
            // The client went before there was an answer.
            (vec![settle(MISSING)], vec![(vec![0], Some(1000))]),
            (vec![settle("503")], vec![(vec![0], None)]),
            (
                vec![settle("200"), commit.clone()],
                vec![(vec![1, 0], Some(3))],
            ),
            (
                vec![commit.clone(), settle("503")],
                vec![(vec![0, 1], Some(3))],
            ),
            (vec![nothing, settle("200")], vec![(vec![0, 1], Some(0))]),
            // A charge holds nothing, so it ends no hold.
            (
                vec![charge, settle("200")],
                vec![(vec![0], Some(3)), (vec![1], None)],
            ),
        ] {
            assert_eq!(asked(&descriptors), expected, "{descriptors:?}");
        }
    }
}
