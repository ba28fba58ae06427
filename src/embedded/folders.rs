//! What lies in the data folder, who owns it, and where the socket is.

use std::{
    env,
    ffi::OsStr,
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{
            DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, chown,
        },
    },
    path::{Path, PathBuf},
};

use nix::unistd::{User, geteuid};

use super::{EmbeddedError, NAME, io_error};

pub(super) const PORT: u16 = 5432;
/// `sun_path` of unix(7) holds 108 bytes, the last of which is NUL.
pub(super) const SOCKET_PATH_MAX_BYTES: usize = 107;
const LOG_MAX_BYTES: u64 = 8 * 1024 * 1024;
const LOG_TAIL_LINES: usize = 12;

/// The unprivileged account that Postgres runs under when the service is root.
#[derive(Clone, Copy, Debug)]
pub(super) struct Account {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl Account {
    /// Chooses the owner of an existing cluster, else `postgres`, else `nobody`; `None` = our own.
    pub(super) fn choose(cluster: &Path) -> Result<Option<Self>, EmbeddedError> {
        if !geteuid().is_root() {
            return Ok(None);
        }
        // A cluster keeps its account when a package adds the user postgres later.
        if let Ok(owner) = fs::metadata(cluster)
            && owner.uid() != 0
        {
            let (uid, gid) = (owner.uid(), owner.gid());
            return Ok(Some(Self { uid, gid }));
        }
        ["postgres", "nobody"]
            .into_iter()
            .find_map(|name| User::from_name(name).ok().flatten())
            .map(|user| {
                let (uid, gid) = (user.uid.as_raw(), user.gid.as_raw());
                Some(Self { uid, gid })
            })
            .ok_or(EmbeddedError::NoAccount)
    }
}

/// The log of everything that runs in the data folder, written through handles we open.
#[derive(Debug)]
pub(super) struct Log {
    pub(super) path: PathBuf,
}

impl Log {
    /// Opens the log, emptied when it has grown large.
    pub(super) fn open(path: PathBuf) -> Result<Self, EmbeddedError> {
        let log = Self { path };
        if log.len() > LOG_MAX_BYTES {
            let cut = log.writer()?.set_len(0);
            cut.map_err(io_error("empty", &log.path))?;
        }
        Ok(log)
    }

    pub(super) fn writer(&self) -> Result<File, EmbeddedError> {
        OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&self.path)
            .map_err(io_error("open", &self.path))
    }

    pub(super) fn len(&self) -> u64 {
        fs::metadata(&self.path).map_or(0, |log| log.len())
    }

    /// Last lines of what was written after the first `start` bytes.
    pub(super) fn tail(&self, start: u64) -> String {
        let mut written = Vec::new();
        if let Ok(mut file) = File::open(&self.path) {
            // What cannot be read is missing from the message, no more.
            let _ = file.seek(SeekFrom::Start(start));
            let _ = file.take(LOG_MAX_BYTES).read_to_end(&mut written);
        }
        let written = String::from_utf8_lossy(&written);
        let lines: Vec<&str> = written.lines().collect();
        lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
    }
}

/// What the server writes about itself into `postmaster.pid`.
pub(super) struct PostmasterStatus {
    pub(super) pid: i32,
    pub(super) socket_dir: PathBuf,
    pub(super) ready: bool,
}

impl PostmasterStatus {
    /// Reads the file; `None` when there is none or its first line is not written yet.
    pub(super) fn read(cluster: &Path) -> Option<Self> {
        let file = fs::read(cluster.join("postmaster.pid")).ok()?;
        // LOCK_FILE_LINE_* of the server's miscadmin.h: pid, data folder, start
        // time, port, socket folder, address, shared memory, status.
        let lines: Vec<&[u8]> = file.split(|byte| *byte == b'\n').collect();
        let line = |number: usize| lines.get(number - 1).copied().unwrap_or_default();
        Some(Self {
            pid: str::from_utf8(line(1)).ok()?.parse().ok()?,
            socket_dir: PathBuf::from(OsStr::from_bytes(line(5))),
            ready: line(8).trim_ascii() == b"ready",
        })
    }
}

/// Makes the data folder when it is missing, and returns its absolute path.
pub(super) fn data_folder(path: &Path) -> Result<PathBuf, EmbeddedError> {
    if !path.exists() {
        fs::create_dir_all(path).map_err(io_error("make", path))?;
        // Another account than root must get through to the cluster.
        let mode = if geteuid().is_root() { 0o711 } else { 0o700 };
        let set = fs::set_permissions(path, Permissions::from_mode(mode));
        set.map_err(io_error("set the permissions of", path))?;
    }
    fs::canonicalize(path).map_err(io_error("find", path))
}

/// Makes the folder for the socket: in the data folder, or a short one where that path is too long.
pub(super) fn socket_folder(
    data_dir: &Path,
    account: Option<Account>,
) -> Result<PathBuf, EmbeddedError> {
    let fits = |dir: &Path| dir.join(socket_name()).as_os_str().len() <= SOCKET_PATH_MAX_BYTES;
    let mut dir = data_dir.join("run");
    if !fits(&dir) {
        let hash = fnv1a(data_dir.as_os_str().as_bytes());
        dir = env::temp_dir().join(format!("tollkeeper-{hash:016x}"));
    }
    if !fits(&dir) {
        return Err(EmbeddedError::SocketPathTooLong(dir.join(socket_name())));
    }
    private_folder(&dir, account)?;
    Ok(dir)
}

/// Makes a folder that only the account can enter, or checks that it is one.
pub(super) fn private_folder(dir: &Path, account: Option<Account>) -> Result<(), EmbeddedError> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(io_error("make", dir)(error));
        }
        _ => {}
    }
    // A temp folder is open to all: whoever came first may have left a link or
    // a folder of their own, to listen in on our socket.
    let found = fs::symlink_metadata(dir).map_err(io_error("look at", dir))?;
    let ours = geteuid().as_raw();
    let owner = account.map_or(ours, |account| account.uid);
    let safe = found.is_dir() && found.mode() & 0o077 == 0;
    if !safe || (found.uid() != owner && found.uid() != ours) {
        return Err(EmbeddedError::FolderNotOurs(dir.to_owned()));
    }
    match account {
        Some(Account { uid, gid }) if found.uid() != uid => {
            chown(dir, Some(uid), Some(gid)).map_err(io_error("change the owner of", dir))
        }
        _ => Ok(()),
    }
}

pub(super) fn socket_name() -> String {
    format!(".s.PGSQL.{PORT}")
}

/// URL with the socket folder as its host: every byte with a meaning in a URL is escaped.
pub(super) fn url(socket_dir: &Path, database: &str) -> String {
    let mut host = String::new();
    for byte in socket_dir.as_os_str().as_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                host.push(char::from(*byte));
            }
            _ => host.push_str(&format!("%{byte:02X}")),
        }
    }
    format!("postgresql://{NAME}@{host}/{database}")
}

/// FNV-1a: the same in every release, unlike the hasher of the standard library.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
