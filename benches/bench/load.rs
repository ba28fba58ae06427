//! The load generator: a closed loop of pre-encoded gRPC calls.
//!
//! On a machine that client and server share, a costly client hides what the server costs. So this
//! speaks HTTP/2 by hand: a request is a copy of prepared bytes, all that are due go out in one
//! write, and of an answer only the status is looked at. What it measures is held against h2load.

mod hpack;

use std::{
    borrow::Cow,
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    io::ErrorKind,
    net::SocketAddr,
    ops::Range,
    sync::{
        Barrier,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use httlib_hpack::Decoder;
use tokio::net::TcpStream;

use crate::process::{Server, cpu_of};

/// What is called, over and over.
pub(crate) struct Calls {
    path: &'static str,
    headers: Vec<(&'static str, String)>,
    bodies: Bodies,
    /// Credentials in turn, in place of a caller that is always the same.
    bearers: Vec<String>,
    next: AtomicUsize,
    /// The `grpc-status` that is right.
    expected: u32,
}

/// gRPC messages as they are on the wire.
enum Bodies {
    /// In the order of their use, and around again.
    InTurn(Vec<Vec<u8>>),
    /// Drawn evenly instead, the same ones in every run.
    AtRandom(Vec<Vec<u8>>),
    /// Made for each call, by its number.
    Fresh(Box<dyn Fn(usize) -> Vec<u8> + Send + Sync>),
}

impl Calls {
    pub(crate) fn new(
        path: &'static str,
        caller: Option<&str>,
        messages: impl IntoIterator<Item = Vec<u8>>,
        expected: tonic::Code,
    ) -> Self {
        let bodies = messages.into_iter().map(framed).collect();
        Self::of(path, caller, Bodies::InTurn(bodies), expected)
    }

    /// Calls no two of which are alike.
    pub(crate) fn fresh(
        path: &'static str,
        caller: Option<&str>,
        message: impl Fn(usize) -> Vec<u8> + Send + Sync + 'static,
        expected: tonic::Code,
    ) -> Self {
        let bodies = Bodies::Fresh(Box::new(move |call| framed(message(call))));
        Self::of(path, caller, bodies, expected)
    }

    fn of(path: &'static str, caller: Option<&str>, bodies: Bodies, expected: tonic::Code) -> Self {
        let mut headers = vec![
            ("content-type", "application/grpc".to_owned()),
            ("te", "trailers".to_owned()),
            ("user-agent", "tollkeeper-bench".to_owned()),
        ];
        headers.extend(caller.map(|caller| ("authorization", format!("Bearer {caller}"))));
        Self {
            path,
            headers,
            bodies,
            bearers: Vec::new(),
            next: AtomicUsize::new(0),
            expected: u32::try_from(i32::from(expected)).unwrap_or_default(),
        }
    }

    pub(crate) fn drawn_at_random(self) -> Self {
        let bodies = match self.bodies {
            Bodies::InTurn(bodies) => Bodies::AtRandom(bodies),
            other => other,
        };
        Self { bodies, ..self }
    }

    /// Each call is by another caller, whose credential goes uncompressed.
    pub(crate) fn by(self, bearers: Vec<String>) -> Self {
        Self { bearers, ..self }
    }

    /// How many there are; of fresh ones there is no end.
    pub(crate) fn len(&self) -> usize {
        match &self.bodies {
            Bodies::InTurn(bodies) | Bodies::AtRandom(bodies) => bodies.len(),
            Bodies::Fresh(_) => usize::MAX,
        }
    }

    pub(crate) fn path(&self) -> &'static str {
        self.path
    }

    pub(crate) fn headers(&self) -> &[(&'static str, String)] {
        &self.headers
    }

    fn bearer(&self, call: usize) -> Option<&str> {
        let turn = scattered(call).checked_rem(self.bearers.len())?;
        Some(&self.bearers[turn])
    }

    /// The body of a call, as it is on the wire.
    pub(crate) fn body(&self, call: usize) -> Cow<'_, [u8]> {
        match &self.bodies {
            Bodies::InTurn(bodies) => Cow::from(&bodies[call % bodies.len()]),
            Bodies::AtRandom(bodies) => Cow::from(&bodies[scattered(call) % bodies.len()]),
            Bodies::Fresh(make) => make(call).into(),
        }
    }
}

/// A number without pattern for each number (`SplitMix64`, Steele et al. 2014).
pub(crate) fn scattered(number: usize) -> usize {
    let mut z = (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) as usize
}

/// A message with gRPC's prefix: not compressed, and its length.
fn framed(message: Vec<u8>) -> Vec<u8> {
    let len = u32::try_from(message.len()).expect("a small message");
    [&[0], &len.to_be_bytes()[..], &message].concat()
}

/// How many calls are under way at once.
#[derive(Clone, Copy)]
pub(crate) struct InFlight {
    pub(crate) connections: usize,
    pub(crate) streams: usize,
}

impl InFlight {
    /// Spreads `total` over at most `connections`.
    pub(crate) fn new(total: usize, connections: usize) -> Self {
        let connections = connections.clamp(1, total);
        Self {
            connections,
            streams: total.div_ceil(connections),
        }
    }
}

/// When to stop beginning calls.
#[derive(Clone, Copy)]
pub(crate) struct Until {
    pub(crate) time: Duration,
    pub(crate) calls: usize,
}

impl Until {
    pub(crate) fn time(time: Duration) -> Self {
        Self {
            time,
            calls: usize::MAX,
        }
    }
}

/// What one slice of load gave.
#[derive(Clone, Debug, Default)]
pub(crate) struct Slice {
    pub(crate) calls: u64,
    /// Answers with another status than expected.
    pub(crate) wrong: u64,
    pub(crate) first_wrong: Option<String>,
    pub(crate) seconds: f64,
    /// Processor time of the server, in microseconds.
    pub(crate) server_cpu_us: f64,
    /// The same of Postgres, where it is looked at.
    pub(crate) postgres_cpu_us: f64,
    /// The same of the generator.
    pub(crate) client_cpu_us: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) request_bytes: f64,
    pub(crate) response_bytes: f64,
}

impl Slice {
    pub(crate) fn per_second(&self) -> f64 {
        self.calls as f64 / self.seconds
    }

    pub(crate) fn cpu_us_per_call(&self) -> f64 {
        (self.server_cpu_us + self.postgres_cpu_us) / self.calls as f64
    }
}

/// Of work that is not done by this generator.
impl Slice {
    /// What calls of these latencies are, one event each, without processor times.
    pub(crate) fn of(mut latencies: Vec<Duration>, took: Duration) -> Self {
        latencies.sort_unstable();
        let quantile = |q: f64| {
            let at = (latencies.len() as f64 * q) as usize;
            let found = latencies.get(at.min(latencies.len().saturating_sub(1)));
            found.map_or(f64::NAN, |found| found.as_secs_f64() * 1e6)
        };
        Self {
            calls: latencies.len() as u64,
            seconds: took.as_secs_f64(),
            p50_us: quantile(0.50),
            p99_us: quantile(0.99),
            ..Self::default()
        }
    }
}

/// Runs one slice of load from `threads` threads and waits for the last answer.
///
/// # Errors
/// When the connection or the protocol fails; a wrong status is counted.
pub(crate) fn run(
    server: &Server,
    calls: &Calls,
    in_flight: InFlight,
    threads: usize,
    until: Until,
) -> anyhow::Result<Slice> {
    let cpu = || server.cpu();
    run_at(server.address, cpu, calls, in_flight, threads, until)
}

/// [`run`] where more than one process answers: `server_cpu` tells the processor time so far of those
/// that count.
pub(crate) fn run_at(
    address: SocketAddr,
    server_cpu: impl Fn() -> anyhow::Result<Duration>,
    calls: &Calls,
    in_flight: InFlight,
    threads: usize,
    until: Until,
) -> anyhow::Result<Slice> {
    let threads = threads.clamp(1, in_flight.connections);
    let budget = AtomicUsize::new(until.calls);
    let own_cpu = cpu_of("/proc/self/stat")?;
    let ready = Barrier::new(threads + 1);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                // Connections that do not divide evenly go to the first threads.
                let connections = (in_flight.connections + threads - 1 - thread) / threads;
                let (budget, ready) = (&budget, &ready);
                scope.spawn(move || {
                    let run = Run {
                        address,
                        calls,
                        streams: in_flight.streams,
                        until,
                        budget,
                    };
                    run.thread(connections, ready)
                })
            })
            .collect();
        ready.wait();
        let (begun, cpu) = (Instant::now(), server_cpu()?);
        let mut tally = Tally::default();
        for worker in workers {
            tally.add(worker.join().expect("the generator does not panic")?);
        }
        let ended = tally.last.unwrap_or_else(Instant::now);
        let cpu = server_cpu()? - cpu;
        let slice = tally.slice(ended - begun, cpu)?;
        let own_cpu = cpu_of("/proc/self/stat")? - own_cpu;
        Ok(Slice {
            client_cpu_us: own_cpu.as_secs_f64() * 1e6,
            ..slice
        })
    })
}

/// Calls that a connection takes at a time.
const CLAIM: usize = 16;

/// What every connection of a slice knows.
#[derive(Clone, Copy)]
struct Run<'a> {
    address: SocketAddr,
    calls: &'a Calls,
    streams: usize,
    until: Until,
    budget: &'a AtomicUsize,
}

impl Run<'_> {
    /// The next calls, for one connection: each by itself would have the threads wait for one another.
    fn claim(&self) -> Range<usize> {
        let all = |left: usize| Some(left.saturating_sub(CLAIM));
        let relaxed = Ordering::Relaxed;
        let left = self.budget.fetch_update(relaxed, relaxed, all);
        let count = left.unwrap_or_default().min(CLAIM);
        let begin = self.calls.next.fetch_add(count, relaxed);
        begin..begin + count
    }

    fn thread(self, connections: usize, ready: &Barrier) -> anyhow::Result<Tally> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let mut streams = Vec::new();
            let mut failed = None;
            for _ in 0..connections {
                match TcpStream::connect(self.address).await {
                    Ok(stream) => streams.push(stream),
                    Err(error) => failed = Some(error),
                }
            }
            // Whatever happened: the others wait.
            ready.wait();
            if let Some(error) = failed {
                return Err(error).context("cannot connect to the server");
            }
            let stop = Instant::now() + self.until.time;
            let limit = self.until.time + Duration::from_secs(60);
            let all = futures_util::future::try_join_all(
                streams
                    .into_iter()
                    .map(|stream| Connection::new(self, stream, stop).drive()),
            );
            let tallies = tokio::time::timeout(limit, all)
                .await
                .context("the server did not answer for a minute")??;
            let mut sum = Tally::default();
            for tally in tallies {
                sum.add(tally);
            }
            Ok(sum)
        })
    }
}

#[derive(Default)]
struct Tally {
    /// In tenths of a microsecond.
    latencies: Vec<u32>,
    wrong: u64,
    first_wrong: Option<String>,
    sent_bytes: u64,
    received_bytes: u64,
    last: Option<Instant>,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.latencies.extend(other.latencies);
        self.wrong += other.wrong;
        self.first_wrong = self.first_wrong.take().or(other.first_wrong);
        self.sent_bytes += other.sent_bytes;
        self.received_bytes += other.received_bytes;
        self.last = self.last.max(other.last);
    }

    fn slice(mut self, took: Duration, cpu: Duration) -> anyhow::Result<Slice> {
        ensure!(!self.latencies.is_empty(), "no call was answered in time");
        self.latencies.sort_unstable();
        let count = self.latencies.len();
        let quantile = |q: f64| {
            let at = ((count as f64 * q) as usize).min(count - 1);
            f64::from(self.latencies[at]) / 10.0
        };
        Ok(Slice {
            calls: count as u64,
            wrong: self.wrong,
            seconds: took.as_secs_f64(),
            server_cpu_us: cpu.as_secs_f64() * 1e6,
            p50_us: quantile(0.50),
            p99_us: quantile(0.99),
            request_bytes: self.sent_bytes as f64 / count as f64,
            response_bytes: self.received_bytes as f64 / count as f64,
            first_wrong: self.first_wrong,
            ..Slice::default()
        })
    }
}

// RFC 9113 §4.1, §6.
const FRAME_HEADER: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const ACK: u8 = 0x1;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DEFAULT_WINDOW: i64 = 65_535;
const MAX_WINDOW: u32 = i32::MAX as u32;

/// One connection with a number of calls under way.
struct Connection<'a> {
    run: Run<'a>,
    stream: TcpStream,
    stop: Instant,
    out: Vec<u8>,
    /// The header block of every call but the first.
    indexed: Vec<u8>,
    next_stream: u32,
    /// What the server still takes.
    window: i64,
    /// Calls that wait for room in the window.
    due: usize,
    /// The numbers of the next calls.
    claimed: Range<usize>,
    begun: HashMap<u32, Instant, BuildHasherDefault<Numbers>>,
    decoder: Decoder<'static>,
    /// The header block that was decoded last, while it means the same, and its status.
    decoded: (Vec<u8>, Option<String>),
    tally: Tally,
}

impl<'a> Connection<'a> {
    fn new(run: Run<'a>, stream: TcpStream, stop: Instant) -> Self {
        let mut out = PREFACE.to_vec();
        // ENABLE_PUSH = 0.
        frame(&mut out, SETTINGS, 0, 0, &[0, 2, 0, 0, 0, 0]);
        let more = MAX_WINDOW - u32::try_from(DEFAULT_WINDOW).expect("positive");
        frame(&mut out, WINDOW_UPDATE, 0, 0, &more.to_be_bytes());
        Self {
            run,
            stream,
            stop,
            out,
            indexed: Vec::new(),
            next_stream: 1,
            window: DEFAULT_WINDOW,
            due: run.streams,
            claimed: 0..0,
            begun: HashMap::with_capacity_and_hasher(run.streams, BuildHasherDefault::default()),
            decoder: Decoder::default(),
            decoded: Default::default(),
            tally: Tally::default(),
        }
    }

    async fn drive(mut self) -> anyhow::Result<Tally> {
        self.stream.set_nodelay(true)?;
        let mut buffer = vec![0; 256 * 1024];
        let mut filled = 0;
        loop {
            let now = Instant::now();
            while self.due > 0 && self.begin(now) {}
            if self.begun.is_empty() && self.due == 0 {
                return Ok(self.tally);
            }
            self.flush().await?;
            self.stream.readable().await?;
            match self.stream.try_read(&mut buffer[filled..]) {
                Ok(0) => bail!("the server closed the connection"),
                Ok(read) => filled += read,
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error.into()),
            }
            let used = self.take(&buffer[..filled])?;
            buffer.copy_within(used..filled, 0);
            filled -= used;
        }
    }

    async fn flush(&mut self) -> anyhow::Result<()> {
        let mut written = 0;
        while written < self.out.len() {
            match self.stream.try_write(&self.out[written..]) {
                Ok(count) => written += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.stream.writable().await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.out.clear();
        Ok(())
    }

    /// Begins one call that is due, or finds that it must not. False: the window is full.
    fn begin(&mut self, now: Instant) -> bool {
        if now < self.stop && self.claimed.is_empty() {
            self.claimed = self.run.claim();
        }
        if now >= self.stop || self.claimed.is_empty() {
            self.due = 0;
            return true;
        }
        let (calls, next) = (self.run.calls, self.claimed.start);
        let body = calls.body(next);
        let bytes = i64::try_from(body.len()).expect("a small body");
        if self.window < bytes {
            return false;
        }
        self.claimed.start += 1;
        self.window -= bytes;
        self.due -= 1;
        let stream = self.next_stream;
        self.next_stream += 2;
        let mut block = match self.indexed.is_empty() {
            true => Cow::from(self.learn()),
            false => Cow::from(&self.indexed),
        };
        if let Some(bearer) = calls.bearer(next) {
            literal_authorization(block.to_mut(), bearer);
        }
        frame(&mut self.out, HEADERS, END_HEADERS, stream, &block);
        frame(&mut self.out, DATA, END_STREAM, stream, &body);
        self.begun.insert(stream, now);
        self.tally.sent_bytes += body.len() as u64;
        true
    }

    /// The header block of the first call, which fills the server's table (RFC 7541 §6.2.1); from
    /// then on an index stands for each header (§6.1).
    fn learn(&mut self) -> Vec<u8> {
        // `:method: POST` and `:scheme: http` of the static table.
        const STATIC: [u8; 2] = [0x83, 0x86];
        const FIRST_DYNAMIC: usize = 62;
        let authority = self.run.address.to_string();
        let calls = self.run.calls;
        let mut headers = vec![(":path", calls.path), (":authority", authority.as_str())];
        headers.extend(calls.headers.iter().map(|(n, v)| (*n, v.as_str())));
        let mut block = STATIC.to_vec();
        self.indexed = STATIC.to_vec();
        for (position, (name, value)) in headers.iter().enumerate() {
            block.push(0x40);
            for text in [name, value] {
                // Longer ones need a longer length; none is.
                block.push(u8::try_from(text.len()).expect("a short header") & 0x7f);
                block.extend_from_slice(text.as_bytes());
            }
            let index = FIRST_DYNAMIC + headers.len() - 1 - position;
            self.indexed
                .push(0x80 | u8::try_from(index).expect("few headers"));
        }
        block
    }

    /// Reads all frames that are whole; returns their length.
    fn take(&mut self, input: &[u8]) -> anyhow::Result<usize> {
        let now = Instant::now();
        let mut used = 0;
        while let Some((head, rest)) = input[used..].split_first_chunk::<FRAME_HEADER>() {
            let length =
                usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
            let Some(payload) = rest.get(..length) else {
                break;
            };
            let (kind, flags) = (head[3], head[4]);
            let stream = be32(&head[5..]) & MAX_WINDOW;
            used += FRAME_HEADER + length;
            match kind {
                HEADERS => {
                    ensure!(
                        flags & END_HEADERS != 0 && flags & PADDED == 0,
                        "unexpected form of headers"
                    );
                    let is_last = flags & END_STREAM != 0;
                    let status = self.status(payload, is_last)?;
                    if is_last {
                        self.finish(stream, status, now)?;
                    }
                }
                DATA => {
                    self.tally.received_bytes += length as u64;
                    if flags & END_STREAM != 0 {
                        self.finish(stream, None, now)?;
                    }
                }
                RST_STREAM => {
                    let status = Some(format!("RST_STREAM {}", be32(payload)));
                    self.finish(stream, status, now)?;
                }
                SETTINGS if flags & ACK == 0 => frame(&mut self.out, SETTINGS, ACK, 0, &[]),
                PING if flags & ACK == 0 => frame(&mut self.out, PING, ACK, 0, payload),
                GOAWAY => bail!("the server sent GOAWAY"),
                WINDOW_UPDATE if stream == 0 => self.window += i64::from(be32(payload)),
                _ => {}
            }
        }
        Ok(used)
    }

    /// A block that changes the table has to be decoded, whatever it says.
    fn status(&mut self, block: &[u8], is_last: bool) -> anyhow::Result<Option<String>> {
        let leaves_table = hpack::leaves_table(block);
        if leaves_table && !is_last {
            return Ok(None);
        }
        if leaves_table && self.decoded.0 == block {
            return Ok(self.decoded.1.clone());
        }
        let mut fields = Vec::with_capacity(8);
        self.decoder
            .decode(&mut block.to_vec(), &mut fields)
            .map_err(|error| anyhow::anyhow!("headers cannot be decoded: {error:?}"))?;
        let status = fields
            .into_iter()
            .find(|(name, ..)| name == b"grpc-status")
            .map(|(_, value, _)| String::from_utf8_lossy(&value).into_owned());
        self.decoded = match leaves_table {
            true => (block.to_vec(), status.clone()),
            false => Default::default(),
        };
        Ok(status)
    }

    fn finish(&mut self, stream: u32, status: Option<String>, now: Instant) -> anyhow::Result<()> {
        let begun = self.begun.remove(&stream);
        let begun = begun.with_context(|| format!("an answer on stream {stream}, unasked"))?;
        let tenths = (now - begun).as_nanos() / 100;
        self.tally
            .latencies
            .push(u32::try_from(tenths).unwrap_or(u32::MAX));
        self.tally.last = Some(now);
        self.due += 1;
        let right = status
            .as_deref()
            .is_some_and(|status| status.parse() == Ok(self.run.calls.expected));
        if !right {
            self.tally.wrong += 1;
            let said = || format!("grpc-status {}", status.as_deref().unwrap_or("missing"));
            self.tally.first_wrong.get_or_insert_with(said);
        }
        Ok(())
    }
}

/// Hashes numbers that are no secret.
#[derive(Default)]
struct Numbers(u64);

impl Hasher for Numbers {
    fn write(&mut self, _bytes: &[u8]) {
        unreachable!("streams have numbers");
    }

    fn write_u32(&mut self, number: u32) {
        self.0 = u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// `authorization` of the static table with a value that no table keeps (RFC 7541 §6.2.3, §5.1).
fn literal_authorization(block: &mut Vec<u8>, bearer: &str) {
    block.extend([0x1f, 23 - 15]);
    let value = format!("Bearer {bearer}");
    let mut length = value.len();
    if length < 127 {
        block.push(length as u8);
    } else {
        block.push(127);
        length -= 127;
        while length >= 128 {
            block.push((length % 128) as u8 | 0x80);
            length /= 128;
        }
        block.push(length as u8);
    }
    block.extend_from_slice(value.as_bytes());
}

fn frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len()).expect("a small frame");
    out.extend_from_slice(&length.to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

fn be32(bytes: &[u8]) -> u32 {
    let four = bytes.first_chunk::<4>().copied();
    u32::from_be_bytes(four.unwrap_or_default())
}
