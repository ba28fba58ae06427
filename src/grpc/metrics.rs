//! How many calls ended how, and how long they took.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
    time::Duration,
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::{Registry, Unit},
};
use tonic::Code;

use super::access::Rules;

/// Seconds: answers from memory take microseconds, logins wait for a hash.
const BUCKETS: [f64; 13] = [
    20e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 50e-3, 0.25, 1.0, 5.0,
];

/// gRPC knows the codes 0 to 16.
const CODES: usize = 17;

/// The calls of every RPC. Cheap to clone.
#[derive(Clone)]
pub struct CallMetrics(Arc<Calls>);

struct Calls {
    by_path: HashMap<String, Arc<RpcMetrics>>,
    /// Of whatever is no RPC of ours: one series, however many paths are tried.
    other: Arc<RpcMetrics>,
    families: Families,
}

#[derive(Clone)]
struct Families {
    requests: Family<CallLabels, Counter>,
    durations: Family<RpcLabels, Histogram, fn() -> Histogram>,
}

/// The calls of one RPC. A series exists from the first call that it counts.
pub(super) struct RpcMetrics {
    labels: RpcLabels,
    families: Families,
    by_code: [OnceLock<Counter>; CODES],
    duration: OnceLock<Histogram>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RpcLabels {
    service: String,
    method: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    service: String,
    method: String,
    code: String,
}

impl CallMetrics {
    /// Metrics of the RPCs that have a rule.
    pub fn new(rules: &Rules) -> Self {
        let families = Families {
            requests: Family::default(),
            durations: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
        };
        let rpc = |service: &str, method: &str| {
            Arc::new(RpcMetrics {
                labels: RpcLabels {
                    service: service.to_owned(),
                    method: method.to_owned(),
                },
                families: families.clone(),
                by_code: [const { OnceLock::new() }; CODES],
                duration: OnceLock::new(),
            })
        };
        let by_path = rules.paths().map(|path| {
            let (service, method) = path
                .trim_start_matches('/')
                .split_once('/')
                .unwrap_or(("", ""));
            (path.to_owned(), rpc(service, method))
        });
        Self(Arc::new(Calls {
            by_path: by_path.collect(),
            other: rpc("other", "other"),
            families,
        }))
    }

    /// Shows them to whoever reads the registry.
    pub fn register(&self, registry: &mut Registry) {
        let Families {
            requests,
            durations,
        } = &self.0.families;
        registry.register(
            "grpc_requests",
            "Calls that were answered, by their status; streams: when they began",
            requests.clone(),
        );
        registry.register_with_unit(
            "grpc_request_duration",
            "From the head of the request to the head of the answer",
            Unit::Seconds,
            durations.clone(),
        );
    }

    pub(super) fn of(&self, path: &str) -> &Arc<RpcMetrics> {
        self.0.by_path.get(path).unwrap_or(&self.0.other)
    }
}

impl RpcMetrics {
    pub(super) fn record(&self, code: Code, took: Duration) {
        let requests = self.by_code[code as usize].get_or_init(|| {
            let RpcLabels { service, method } = self.labels.clone();
            let labels = CallLabels {
                service,
                method,
                code: format!("{code:?}"),
            };
            self.families.requests.get_or_create_owned(&labels)
        });
        requests.inc();
        let durations = || self.families.durations.get_or_create_owned(&self.labels);
        self.duration
            .get_or_init(durations)
            .observe(took.as_secs_f64());
    }
}
