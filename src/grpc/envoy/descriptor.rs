//! What the descriptors of a gateway ask for.

use crate::{
    error::{Error, Result},
    grpc::{
        convert::{Fields, token_count},
        reservation, wire,
    },
    model::{TokenCounts, Tokens, UserId, Violation},
    proto::envoy::extensions::common::ratelimit::v3::RateLimitDescriptor,
    usage::{QuotaRequest, QuotaWish, RequestName, lease::Mode},
};

/// A value that a gateway puts where it found none: so it is sent at all, and then denied.
pub(super) const MISSING: &str = "__missing__";

/// A descriptor, where it lies in the message.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Descriptor<'a> {
    entries: Vec<(&'a str, &'a str)>,
    hits_addend: Option<u64>,
    is_negative_hits: bool,
}

impl<'a> From<&'a RateLimitDescriptor> for Descriptor<'a> {
    fn from(descriptor: &'a RateLimitDescriptor) -> Self {
        let entries = descriptor.entries.iter();
        Self {
            entries: entries.map(|one| (&*one.key, &*one.value)).collect(),
            hits_addend: descriptor.hits_addend,
            is_negative_hits: descriptor.is_negative_hits,
        }
    }
}

impl<'a> Descriptor<'a> {
    /// Reads the one descriptor of a `RateLimitRequest` and the hits of the whole request, if it is one that
    /// [`wire`] reads.
    pub(super) fn read_alone(message: &'a [u8]) -> Option<(Self, u32)> {
        let (mut descriptor, mut hits) = (None, None);
        wire::read(message, |number, value| match number {
            2 => wire::once(&mut descriptor, value.bytes()),
            3 => wire::once(&mut hits, value.number()),
            _ => Some(()),
        })?;
        let hits = u32::try_from(hits.unwrap_or_default()).ok()?;
        Some((Self::read(descriptor?)?, hits))
    }

    /// Reads a `RateLimitDescriptor`, if it is one that [`wire`] reads.
    pub(super) fn read(message: &'a [u8]) -> Option<Self> {
        let mut entries = Vec::with_capacity(KEYS.len());
        let (mut hits, mut is_negative_hits) = (None, None);
        wire::read(message, |number, value| {
            match number {
                1 => entries.push(wire::pair(value.bytes()?)?),
                3 => wire::once(&mut hits, value.bytes())?,
                4 => wire::once(&mut is_negative_hits, value.number())?,
                _ => {}
            }
            Some(())
        })?;
        let mut hits_addend = None;
        if let Some(hits) = hits {
            wire::read(hits, |number, value| match number {
                1 => wire::once(&mut hits_addend, value.number()),
                _ => Some(()),
            })?;
        }
        Some(Self {
            entries,
            hits_addend: hits.map(|_| hits_addend.unwrap_or_default()),
            is_negative_hits: is_negative_hits.is_some_and(|number| number != 0),
        })
    }
}

/// What a descriptor asks for.
#[derive(Debug)]
pub(super) enum Ask {
    /// Whether so many may be used.
    Check(UserId, QuotaWish),
    /// To hold them.
    Reserve(UserId, QuotaRequest),
    /// To book what a request used.
    Book(Of, TokenCounts),
    /// To book this unless it is told what the request used.
    Settle(Of, TokenCounts),
    /// To hold nothing more for a request.
    Release(Of),
}

/// The request that something is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Of {
    pub(super) user: UserId,
    pub(super) request: RequestName,
    pub(super) hold: Hold,
}

impl Of {
    pub(super) fn is_same_request(&self, other: &Self) -> bool {
        (self.user, &self.request) == (other.user, &other.request)
    }
}

/// Which hold of a request is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    /// The one of this handle.
    Named(String),
    /// Whichever the asked replica has.
    OfRequest,
    /// None: the request is charged.
    None,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Op {
    Check,
    Reserve,
    Commit,
    Charge,
    Settle,
    Release,
}

const KEYS: [&str; 8] = [
    "op",
    "user",
    "model",
    "request_id",
    "reservation",
    "dimension",
    "lifetime",
    "status",
];

/// Statuses of HTTP from here on are errors: their request used nothing that is not told.
const ERRORS_FROM: u16 = 400;

/// Reads a descriptor; `hits` are those of the whole request.
///
/// # Errors
/// `Invalid`, naming every entry that is missing, wrong, twice there, or not known.
pub(super) fn read(descriptor: &Descriptor<'_>, hits: u32) -> Result<Ask> {
    let mut fields = Fields::default();
    let entries = &descriptor.entries;
    if entries.len() > KEYS.len() {
        let most = format!("must be {} at most", KEYS.len());
        return Err(Error::invalid("entries", most));
    }
    let keys = entries.iter().map(|(key, _)| *key);
    if let Some(twice) = keys
        .clone()
        .find(|key| keys.clone().filter(|of| of == key).count() > 1)
    {
        fields.take::<()>(twice, Err("must be there once".into()));
    }
    if keys.clone().any(|key| !KEYS.contains(&key)) {
        let known = format!("must have no other keys than {}", KEYS.join(", "));
        fields.take::<()>("entries", Err(known.into()));
    }
    let text = |key: &str| {
        let entry = entries.iter().find(|(of, _)| *of == key);
        let value = entry.map_or("", |(_, value)| value);
        if value == MISSING { "" } else { value }
    };
    // What may be left out is not left out by a gateway that found nothing to put there.
    let optional = |fields: &mut Fields, key: &str| {
        let text = text(key);
        if text.is_empty() && entries.iter().any(|(of, _)| *of == key) {
            fields.take::<()>(key, Err("must not be empty".into()));
        }
        text
    };
    let op = fields.take("op", op(text("op")));
    let user = fields.parse("user", text("user"));
    let tokens = match op {
        Some(Op::Release) => Some(0),
        _ => fields.take("hits_addend", tokens(descriptor, hits)),
    };
    let Some(op) = op else {
        return fields.finish(None);
    };
    if op == Op::Check || (op == Op::Reserve && tokens == Some(0)) {
        let model = optional(&mut fields, "model");
        let model = fields.parse_optional("model", model);
        let wish = || {
            Some(QuotaWish {
                tokens: tokens?,
                model: model?,
            })
        };
        return fields.finish(user.zip(wish()).map(|(user, wish)| Ask::Check(user, wish)));
    }
    let model = fields.parse("model", text("model"));
    let request_id = fields.parse("request_id", text("request_id"));
    if op == Op::Reserve {
        let lifetime = match optional(&mut fields, "lifetime") {
            "" => Some(reservation::DEFAULT_LIFETIME),
            text => fields.take("lifetime", reservation::lifetime_from(text)),
        };
        let request = || {
            Some(QuotaRequest {
                request_id: request_id?,
                model: model?,
                tokens: tokens?,
                mode: Mode::AllOrNothing,
                lifetime: lifetime?,
            })
        };
        let asked = user.zip(request());
        return fields.finish(asked.map(|(user, request)| Ask::Reserve(user, request)));
    }
    let counts = match op {
        Op::Release => Some(TokenCounts::default()),
        _ => {
            let dimension = optional(&mut fields, "dimension");
            fields.take("dimension", counts(dimension, tokens.unwrap_or_default()))
        }
    };
    // A request without an answer has none.
    let status = match text("status") {
        "" => Some(None),
        status => fields.take("status", http_status(status)).map(Some),
    };
    let of = || {
        Some(Of {
            user: user?,
            request: RequestName {
                request_id: request_id?,
                model: model?,
            },
            hold: match (op, text("reservation")) {
                (Op::Charge, _) => Hold::None,
                (_, "") => Hold::OfRequest,
                (_, handle) => Hold::Named(handle.to_owned()),
            },
        })
    };
    let used = || {
        let (counts, of, status) = (tokens.and(counts)?, of()?, status?);
        Some(match op {
            Op::Release => Ask::Release(of),
            Op::Settle if status.is_some_and(|status| status >= ERRORS_FROM) => Ask::Release(of),
            Op::Settle => Ask::Settle(of, counts),
            _ => Ask::Book(of, counts),
        })
    };
    fields.finish(used())
}

fn op(text: &str) -> Result<Op, Violation> {
    match text {
        "check" => Ok(Op::Check),
        "reserve" => Ok(Op::Reserve),
        "commit" => Ok(Op::Commit),
        "charge" => Ok(Op::Charge),
        "settle" => Ok(Op::Settle),
        "release" => Ok(Op::Release),
        _ => Err("must be check, reserve, commit, charge, settle or release".into()),
    }
}

fn http_status(text: &str) -> Result<u16, Violation> {
    match text.parse() {
        Ok(status @ 100..=599) => Ok(status),
        _ => Err("must be a status of HTTP".into()),
    }
}

/// The descriptor's own number, also 0; else the request's, of which 0 means 1.
fn tokens(descriptor: &Descriptor<'_>, hits: u32) -> Result<Tokens, Violation> {
    if descriptor.is_negative_hits {
        return Err("must not be negative: what was used stays used".into());
    }
    let tokens = descriptor.hits_addend.unwrap_or(u64::from(hits.max(1)));
    token_count(i64::try_from(tokens).unwrap_or(i64::MAX))
}

/// Tokens of one dimension: of the answer, unless another one is named.
fn counts(dimension: &str, tokens: Tokens) -> Result<TokenCounts, Violation> {
    let mut counts = TokenCounts::default();
    let count = match dimension {
        "" | "output" => &mut counts.output,
        "input" => &mut counts.input,
        "cached_input" => &mut counts.cached_input,
        "cache_write" => &mut counts.cache_write,
        "reasoning" => &mut counts.reasoning,
        _ => {
            let names = "must be input, output, cached_input, cache_write or reasoning";
            return Err(names.into());
        }
    };
    *count = tokens;
    Ok(counts)
}

#[cfg(test)]
pub(super) mod tests {
    use prost::Message as _;

    use super::*;
    use crate::proto::envoy::{
        extensions::common::ratelimit::v3::rate_limit_descriptor::Entry,
        service::ratelimit::v3::RateLimitRequest,
    };

    const USER: &str = "01890a5d-ac96-774b-bcce-b302099a8057";

    fn ask(descriptor: &RateLimitDescriptor, hits: u32) -> Result<Ask> {
        read(&descriptor.into(), hits)
    }

    fn entry((key, value): (&str, &str)) -> Entry {
        Entry {
            key: key.to_owned(),
            value: value.to_owned(),
        }
    }

    pub(in super::super) fn descriptor(
        entries: &[(&str, &str)],
        hits_addend: Option<u64>,
    ) -> RateLimitDescriptor {
        RateLimitDescriptor {
            entries: entries.iter().copied().map(entry).collect(),
            hits_addend,
            is_negative_hits: false,
        }
    }

    pub(in super::super) fn of_request(
        op: &str,
        more: &[(&str, &str)],
        hits: Option<u64>,
    ) -> RateLimitDescriptor {
        let whole = [
            ("op", op),
            ("user", USER),
            ("model", "m"),
            ("request_id", "r"),
        ];
        descriptor(&[&whole[..], more].concat(), hits)
    }

    fn wrong(descriptor: &RateLimitDescriptor) -> Vec<String> {
        match ask(descriptor, 0) {
            Err(Error::Invalid(violations)) => {
                violations.0.into_iter().map(|one| one.field).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    fn tokens_of(descriptor: &RateLimitDescriptor, hits: u32) -> i64 {
        match ask(descriptor, hits).expect("valid") {
            Ask::Check(_, wish) => wish.tokens,
            Ask::Reserve(_, request) => request.tokens,
            Ask::Book(_, counts) => counts.total(),
            Ask::Settle(..) | Ask::Release(_) => panic!("has none"),
        }
    }

    #[test]
    fn the_descriptors_own_hits_come_before_the_requests_of_which_none_means_one() {
        for op in ["check", "commit", "charge"] {
            assert_eq!(tokens_of(&of_request(op, &[], None), 0), 1, "{op}");
            assert_eq!(tokens_of(&of_request(op, &[], None), 7), 7, "{op}");
            assert_eq!(tokens_of(&of_request(op, &[], Some(5)), 7), 5, "{op}");
            assert_eq!(tokens_of(&of_request(op, &[], Some(0)), 7), 0, "{op}");
        }
        assert_eq!(tokens_of(&of_request("reserve", &[], None), 0), 1);
        for beyond in [1_000_000_000_001, u64::MAX] {
            assert_eq!(
                wrong(&of_request("charge", &[], Some(beyond))),
                ["hits_addend"]
            );
        }
        let refund = RateLimitDescriptor {
            is_negative_hits: true,
            ..of_request("charge", &[], Some(5))
        };
        assert_eq!(wrong(&refund), ["hits_addend"]);
    }

    #[test]
    fn to_reserve_nothing_is_to_look() {
        let read = ask(&of_request("reserve", &[], Some(0)), 3).expect("valid");
        assert!(matches!(read, Ask::Check(_, wish) if wish.tokens == 0));
    }

    #[test]
    fn what_is_missing_or_unknown_is_named() {
        assert_eq!(wrong(&descriptor(&[], None)), ["op", "user"]);
        let missing = [("op", "check"), ("user", MISSING)];
        assert_eq!(wrong(&descriptor(&missing, None)), ["user"]);
        for op in ["reserve", "commit", "charge", "settle", "release"] {
            let bare = [("op", op), ("user", USER)];
            assert_eq!(
                wrong(&descriptor(&bare, None)),
                ["model", "request_id"],
                "{op}"
            );
        }
        assert_eq!(wrong(&of_request("chargeback", &[], None)), ["op"]);
        for (more, field) in [
            (("remote_address", "10.0.0.1"), "entries"),
            (("user", USER), "user"),
        ] {
            assert_eq!(wrong(&of_request("charge", &[more], None)), [field]);
        }
        let unknown = [("op", "check"), ("user", USER), ("model", MISSING)];
        assert_eq!(wrong(&descriptor(&unknown, None)), ["model"]);
        let crowd: Vec<_> = (0..9).map(|_| ("op", "check")).collect();
        assert_eq!(wrong(&descriptor(&crowd, None)), ["entries"]);
        let dimension = [("dimension", "total")];
        assert_eq!(
            wrong(&of_request("charge", &dimension, None)),
            ["dimension"]
        );
        let lifetime = [("lifetime", "1d")];
        assert_eq!(wrong(&of_request("reserve", &lifetime, None)), ["lifetime"]);
    }

    #[test]
    fn a_commit_means_the_handles_hold_or_the_requests_and_a_charge_none() {
        let hold = |op, more: &[(&str, &str)]| match ask(&of_request(op, more, None), 0) {
            Ok(Ask::Book(of, _) | Ask::Release(of)) => of.hold,
            other => panic!("{other:?}"),
        };
        let named = [("reservation", "handle")];
        let missing = [("reservation", MISSING)];
        for op in ["commit", "release"] {
            assert_eq!(hold(op, &named), Hold::Named("handle".to_owned()));
            assert_eq!(hold(op, &missing), Hold::OfRequest);
            assert_eq!(hold(op, &[]), Hold::OfRequest);
        }
        assert_eq!(hold("charge", &named), Hold::None);
    }

    #[test]
    fn a_status_is_one_of_http() {
        let settle = of_request("settle", &[("status", "teapot")], Some(1000));
        assert_eq!(wrong(&settle), ["status"]);
    }

    #[test]
    fn a_release_looks_at_no_number_and_no_dimension() {
        let release = of_request("release", &[("dimension", "total")], Some(u64::MAX));
        assert!(matches!(ask(&release, 0), Ok(Ask::Release(_))));
    }

    #[test]
    fn what_is_read_where_it_lies_is_what_the_generated_code_reads() {
        let whole = of_request("commit", &[("status", "")], Some(0));
        let negative = RateLimitDescriptor {
            is_negative_hits: true,
            ..descriptor(&[], Some(u64::MAX))
        };
        for sent in [RateLimitDescriptor::default(), whole, negative] {
            let bytes = sent.encode_to_vec();
            assert_eq!(Descriptor::read(&bytes), Some(Descriptor::from(&sent)));
        }
        // A second number would have to be merged.
        let hits = descriptor(&[], Some(1)).encode_to_vec();
        assert_eq!(Descriptor::read(&[&hits[..], &hits].concat()), None);
    }

    #[test]
    fn a_request_is_read_where_it_lies_if_it_has_one_descriptor() {
        let one = of_request("check", &[], None);
        let sent = |descriptors: &[RateLimitDescriptor], hits_addend| {
            let request = RateLimitRequest {
                descriptors: descriptors.to_vec(),
                hits_addend,
            };
            request.encode_to_vec()
        };
        for hits in [0, 7, u32::MAX] {
            let bytes = sent(std::slice::from_ref(&one), hits);
            assert_eq!(Descriptor::read_alone(&bytes), Some(((&one).into(), hits)));
        }
        assert_eq!(Descriptor::read_alone(&sent(&[], 1)), None);
        assert_eq!(
            Descriptor::read_alone(&sent(&[one.clone(), one.clone()], 1)),
            None
        );
        // More than 32 bits: the generated code takes the last ones.
        let mut more = sent(&[one], 0);
        more.extend([0x18, 0x80, 0x80, 0x80, 0x80, 0x10]);
        assert_eq!(Descriptor::read_alone(&more), None);
    }
}
