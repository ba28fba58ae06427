//! How many calls ended how, and how long they took.

use std::{
    array,
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _, NoLabelSet},
    metrics::{MetricType, counter::ConstCounter},
    registry::{Registry, Unit},
};
use tonic::Code;

use super::access::Rules;
use crate::model::PerThread;

/// Seconds: answers from memory take microseconds, logins wait for a hash.
const BUCKETS: [f64; 13] = [
    20e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 50e-3, 0.25, 1.0, 5.0,
];

/// gRPC knows the codes 0 to 16.
const CODES: usize = 17;

/// The calls of every RPC. Cheap to clone.
#[derive(Clone, Debug)]
pub struct CallMetrics(Arc<Calls>);

#[derive(Debug)]
struct Calls {
    by_path: BTreeMap<String, Arc<RpcMetrics>>,
    /// Of whatever is no RPC of ours: one series, however many paths are tried.
    other: Arc<RpcMetrics>,
}

/// The calls of one RPC.
#[derive(Debug)]
pub(super) struct RpcMetrics {
    labels: RpcLabels,
    /// A series exists from the first call that it counts.
    counted: OnceLock<Box<PerThread<Counted>>>,
}

#[derive(Debug, Default)]
struct Counted {
    by_code: [AtomicU64; CODES],
    /// The last one is of all that took longer.
    by_duration: [AtomicU64; BUCKETS.len() + 1],
    nanos: AtomicU64,
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
        let rpc = |service: &str, method: &str| {
            Arc::new(RpcMetrics {
                labels: RpcLabels {
                    service: service.to_owned(),
                    method: method.to_owned(),
                },
                counted: OnceLock::new(),
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
        }))
    }

    /// Shows them to whoever reads the registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register_collector(Box::new(self.clone()));
    }

    pub(super) fn of(&self, path: &str) -> &Arc<RpcMetrics> {
        self.0.by_path.get(path).unwrap_or(&self.0.other)
    }
}

impl Collector for CallMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let rpcs = self.0.by_path.values().chain([&self.0.other]);
        let sums: Vec<(&RpcLabels, Sums)> = rpcs
            .filter_map(|rpc| Some((&rpc.labels, Sums::of(rpc.counted.get()?))))
            .collect();
        let mut requests = encoder.encode_descriptor(
            "grpc_requests",
            "Calls that were answered, by their status; streams: when they began",
            None,
            MetricType::Counter,
        )?;
        for (rpc, sums) in &sums {
            let counted = (0..).zip(sums.by_code).filter(|(_, calls)| *calls > 0);
            for (code, calls) in counted {
                let RpcLabels { service, method } = (*rpc).clone();
                let labels = CallLabels {
                    service,
                    method,
                    code: format!("{:?}", Code::from_i32(code)),
                };
                ConstCounter::new(calls).encode(requests.encode_family(&labels)?)?;
            }
        }
        let mut durations = encoder.encode_descriptor(
            "grpc_request_duration",
            "From the head of the request to the head of the answer",
            Some(&Unit::Seconds),
            MetricType::Histogram,
        )?;
        for (rpc, sums) in &sums {
            let bounds = BUCKETS.into_iter().chain([f64::INFINITY]);
            let buckets: Vec<(f64, u64)> = bounds.zip(sums.by_duration).collect();
            let seconds = Duration::from_nanos(sums.nanos).as_secs_f64();
            let calls = sums.by_duration.iter().sum();
            durations
                .encode_family(*rpc)?
                .encode_histogram::<NoLabelSet>(seconds, calls, &buckets, None)?;
        }
        Ok(())
    }
}

impl RpcMetrics {
    pub(super) fn record(&self, code: Code, took: Duration) {
        let counted = self.counted.get_or_init(Box::default).here();
        let seconds = took.as_secs_f64();
        let bucket = BUCKETS.partition_point(|bound| *bound < seconds);
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        for (counter, more) in [
            (&counted.by_code[code as usize], 1),
            (&counted.by_duration[bucket], 1),
            (&counted.nanos, nanos),
        ] {
            counter.fetch_add(more, Ordering::Relaxed);
        }
    }
}

/// What all threads have counted.
struct Sums {
    by_code: [u64; CODES],
    by_duration: [u64; BUCKETS.len() + 1],
    nanos: u64,
}

impl Sums {
    fn of(counted: &PerThread<Counted>) -> Self {
        let sum = |counter: &dyn Fn(&Counted) -> &AtomicU64| {
            let counters = counted.iter().map(counter);
            counters.map(|one| one.load(Ordering::Relaxed)).sum()
        };
        Self {
            by_code: array::from_fn(|code| sum(&|of| &of.by_code[code])),
            by_duration: array::from_fn(|bucket| sum(&|of| &of.by_duration[bucket])),
            nanos: sum(&|of| &of.nanos),
        }
    }
}
