//! Servers as processes of their own, and the processor time they use.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::{self, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, SysconfVar, sysconf},
};

const START_DEADLINE: Duration = Duration::from_secs(60);

/// A server under test. Dropping it stops it.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    /// Of the operations port.
    ops: Option<SocketAddr>,
    log: PathBuf,
    child: Child,
}

impl Server {
    /// Starts a program that prints its address and serves until its standard input ends.
    pub(crate) fn echo(program: &Path, args: &[&str]) -> anyhow::Result<Self> {
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let out = child.stdout.take().context("its output is a pipe")?;
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line)?;
        let address = line.trim().parse().context("no address from the echo")?;
        Ok(Self {
            address,
            ops: None,
            log: PathBuf::new(),
            child,
        })
    }

    /// Starts the service with these settings and nothing of this environment; its logs go to a file.
    pub(crate) fn service(
        program: &Path,
        settings: &[(String, String)],
        log: &Path,
    ) -> anyhow::Result<Self> {
        // Should this process be killed, the service ends too.
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "TERM", "--"])
            .arg(program)
            .args(["serve", "--listen", "127.0.0.1:0"])
            .args(["--set", "ops.listen=127.0.0.1:0"])
            .env_clear()
            .envs(settings.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(log)?)
            .spawn()
            .context("cannot start the service by setpriv")?;
        let begun = Instant::now();
        loop {
            let said = fs::read_to_string(log)?;
            if let Some((address, ops)) = said.lines().find_map(addresses_in) {
                return Ok(Self {
                    address,
                    ops,
                    log: log.to_owned(),
                    child,
                });
            }
            if let Some(status) = child.try_wait()? {
                bail!("the service did not start ({status}):\n{said}");
            }
            ensure!(
                begun.elapsed() < START_DEADLINE,
                "the service does not listen:\n{said}"
            );
            sleep(Duration::from_millis(20));
        }
    }

    /// Processor time so far, of user and system.
    pub(crate) fn cpu(&self) -> anyhow::Result<Duration> {
        cpu_of(&format!("/proc/{}/stat", self.child.id()))
    }
}

/// What the service says of itself and the kernel of it.
impl Server {
    /// Memory that the process holds.
    pub(crate) fn resident_bytes(&self) -> anyhow::Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next());
        let kib: f64 = kib.context("no resident memory")?.parse()?;
        Ok(kib * 1024.0)
    }

    /// A value of its metrics, by its name and labels.
    pub(crate) fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let mut stream = TcpStream::connect(self.ops.context("no operations port")?)?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: bench\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let prefix = format!("tollkeeper_{name} ");
        let value = text.lines().find_map(|line| line.strip_prefix(&prefix));
        Ok(value
            .with_context(|| format!("no metric {name}"))?
            .parse()?)
    }
}

impl Server {
    /// The last lines of its log above information.
    pub(crate) fn complaints(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let complaints = log.lines().filter(|line| !line.contains("\"INFO\""));
        let mut last: Vec<_> = complaints.rev().take(20).collect();
        last.reverse();
        last.join("\n")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // An echo ends with its input; a service drains. Both die in the end.
        drop(self.child.stdin.take());
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(10) {
            if matches!(self.child.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A Postgres, as the kernel sees it.
#[derive(Clone, Copy)]
pub(crate) struct Postgres {
    postmaster: u32,
}

impl Postgres {
    /// The one that runs in a data folder.
    pub(crate) fn of(folder: &Path) -> anyhow::Result<Self> {
        let text = fs::read_to_string(folder.join("postmaster.pid"))?;
        let first = text.lines().next().context("an empty postmaster.pid")?;
        Ok(Self {
            postmaster: first.trim().parse()?,
        })
    }

    /// Processor time so far of all its processes, those that have ended included.
    pub(crate) fn cpu(&self) -> anyhow::Result<Duration> {
        let own = format!("/proc/{}/stat", self.postmaster);
        let mut sum = sum_of(&own, [14, 15])? + sum_of(&own, [16, 17])?;
        for entry in fs::read_dir("/proc")? {
            let stat = entry?.path().join("stat");
            let stat = stat.to_string_lossy();
            // What is no process, or ends meanwhile, is none of its own for long.
            let Ok(text) = fs::read_to_string(&*stat) else {
                continue;
            };
            let parent = text
                .rsplit_once(')')
                .map(|(_, rest)| rest.split_whitespace());
            if parent.and_then(|mut rest| rest.nth(1)) == Some(&self.postmaster.to_string()) {
                sum += cpu_of(&stat).unwrap_or_default();
            }
        }
        Ok(sum)
    }
}

/// A process that keeps every core busy. Dropping it ends it.
pub(crate) struct Burner(Child);

impl Burner {
    pub(crate) fn start() -> anyhow::Result<Self> {
        let child = Command::new(std::env::current_exe()?)
            .arg("burn")
            .stdin(Stdio::piped())
            .spawn()?;
        Ok(Self(child))
    }
}

impl Drop for Burner {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Ends this process with its standard input: so with whoever started it.
pub(crate) fn end_with_standard_input() {
    thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(0);
    });
}

/// Spins on every core until standard input ends.
pub(crate) fn burn() {
    for _ in 0..crate::cores() {
        thread::spawn(|| {
            loop {
                std::hint::spin_loop();
            }
        });
    }
    let _ = std::io::stdin().read(&mut [0]);
}

/// The addresses in the log line that says where the service listens.
fn addresses_in(line: &str) -> Option<(SocketAddr, Option<SocketAddr>)> {
    let event: serde_json::Value = serde_json::from_str(line).ok()?;
    let listens = event["message"] == "listening";
    let address = |name: &str| event[name].as_str()?.parse().ok();
    listens.then(|| Some((address("address")?, address("ops"))))?
}

/// `utime` and `stime` of proc(5), in ticks of usually 10 ms.
pub(crate) fn cpu_of(stat: &str) -> anyhow::Result<Duration> {
    sum_of(stat, [14, 15])
}

/// Of the children of this process that have ended: `cutime` and `cstime`.
pub(crate) fn cpu_of_children() -> anyhow::Result<Duration> {
    sum_of("/proc/self/stat", [16, 17])
}

fn sum_of(stat: &str, fields: [usize; 2]) -> anyhow::Result<Duration> {
    let text = fs::read_to_string(stat).context("the server has ended")?;
    // The name in parentheses may hold anything.
    let (_, rest) = text.rsplit_once(')').context("an unknown form of stat")?;
    let field = |number: usize| -> anyhow::Result<u64> {
        let text = rest.split_whitespace().nth(number - 3);
        Ok(text.context("a short stat")?.parse()?)
    };
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("no clock ticks")?;
    let ticks = field(fields[0])? + field(fields[1])?;
    Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}
