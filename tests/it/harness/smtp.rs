use std::{
    env, fs,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use serde_json::{Value, json};
use tollkeeper::config::{MailTls, Secret, Settings};

use super::{Authority, Letter};

/// Somebody else's SMTP server (Python's aiosmtpd). What it does depends on whom a mail is to:
/// `refused…` does not exist, `greylisted…` is to come again, `slow…` takes a while after it has it,
/// `clinging…` a while to let go, `silent…` never says that it has it, and `denied-CODE-ENHANCED` is
/// none of ours to mail to.
pub(crate) struct SmtpServer {
    child: Child,
    pub(crate) port: u16,
    protection: Protection,
    folder: tempfile::TempDir,
    authority: Authority,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protection {
    None,
    /// And asks for a name and a password.
    StartTls,
    Tls,
}

/// What [`Protection::StartTls`] asks for.
pub(crate) const USER: &str = "tollkeeper";
pub(crate) const SMTP_PASSWORD: &str = "the password of the mail server";

const SCRIPT: &str = r#"
import asyncio, json, ssl, sys
from aiosmtpd.smtp import SMTP, AuthResult

given = json.loads(sys.argv[1])
seen = set()

class Handler:
    async def handle_RCPT(self, server, session, envelope, address, options):
        local = address.split("@")[0]
        if local.startswith("refused"):
            return "550 5.1.1 nobody is called " + address
        if local.startswith("greylisted") and address not in seen:
            seen.add(address)
            return "451 4.7.1 come again, " + address
        if local.startswith("denied"):
            _, code, enhanced = local.removesuffix("x").split("-")
            return " ".join(part for part in (code, enhanced, "access denied") if part)
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):
        mail = {
            "from": envelope.mail_from, "to": envelope.rcpt_tos,
            "data": envelope.content.decode(),
            "encrypted": session.ssl is not None or given["protection"] == "Tls",
        }
        session.clings = envelope.rcpt_tos[0].startswith("clinging")
        with open(given["file"], "a") as file:
            file.write(json.dumps(mail) + "\n")
        if envelope.rcpt_tos[0].startswith("slow"):
            await asyncio.sleep(2)
        if envelope.rcpt_tos[0].startswith("silent"):
            await asyncio.sleep(60)
        return "250 OK"

    async def handle_QUIT(self, server, session, envelope):
        if getattr(session, "clings", False):
            await asyncio.sleep(10)
        return "221 Bye"

def known(server, session, envelope, mechanism, data):
    good = (data.login.decode(), data.password.decode()) == (given["user"], given["password"])
    return AuthResult(success=good, handled=False)

context = None
if given["certificate"]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(given["certificate"], given["key"])

def protocol():
    if given["protection"] == "StartTls":
        return SMTP(Handler(), tls_context=context, require_starttls=True,
                    authenticator=known, auth_required=True, ident="test")
    return SMTP(Handler(), ident="test")

async def main():
    at_once = context if given["protection"] == "Tls" else None
    loop = asyncio.get_running_loop()
    server = await loop.create_server(protocol, "127.0.0.1", 0, ssl=at_once)
    print(server.sockets[0].getsockname()[1], flush=True)
    # Until whoever started it is gone.
    await loop.run_in_executor(None, sys.stdin.read)

asyncio.run(main())
"#;

impl SmtpServer {
    pub(crate) fn start(protection: Protection) -> Self {
        let python = env::var_os("TOLLKEEPER_TEST_PYTHON").map_or_else(
            || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/venv/bin/python"),
            PathBuf::from,
        );
        let folder = tempfile::tempdir().expect("a temporary folder");
        let authority = Authority::new();
        let pair = (protection != Protection::None).then(|| authority.local_server());
        let given = json!({
            "protection": format!("{protection:?}"),
            "file": folder.path().join("mails"),
            "certificate": pair.as_ref().map(|pair| &pair.certificate),
            "key": pair.as_ref().map(|pair| &pair.key),
            "user": USER,
            "password": SMTP_PASSWORD,
        });
        let mut child = Command::new(python)
            .args(["-W", "ignore", "-c", SCRIPT, &given.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("scripts/test makes a Python with the packages of scripts/requirements.txt");
        let mut line = String::new();
        let out = child.stdout.take().expect("piped");
        BufReader::new(out).read_line(&mut line).expect("a line");
        let port = line.trim().parse();
        let port = port.expect("needs the packages of scripts/requirements.txt");
        Self {
            child,
            port,
            protection,
            folder,
            authority,
        }
    }

    /// Has a server mail here.
    pub(crate) fn take(&self, settings: &mut Settings) {
        let mail = &mut settings.mail;
        mail.from = "no-reply@example.com".to_owned();
        mail.link_base = "https://app.example.com".to_owned();
        mail.server = format!("localhost:{}", self.port);
        mail.tls = match self.protection {
            Protection::None => MailTls::None,
            Protection::StartTls => MailTls::StartTls,
            Protection::Tls => MailTls::Tls,
        };
        if self.protection != Protection::None {
            mail.ca_file.clone_from(&self.authority.ca);
        }
        if self.protection == Protection::StartTls {
            mail.user = USER.to_owned();
            mail.password = Secret::new(SMTP_PASSWORD);
        }
    }

    /// What it took, the oldest first.
    pub(crate) fn taken(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.folder.path().join("mails")).unwrap_or_default();
        // The last line may be on its way.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let lines = whole.lines().map(serde_json::from_str);
        lines.collect::<Result<_, _>>().expect("JSON")
    }

    pub(crate) fn letters(&self) -> Vec<Letter> {
        let taken = self.taken();
        let raw = taken
            .iter()
            .map(|mail| mail["data"].as_str().expect("a text"));
        raw.map(Letter::read).collect()
    }
}

impl Drop for SmtpServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
