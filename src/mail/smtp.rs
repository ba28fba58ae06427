//! One mail to one server, by SMTP (RFC 5321), step by step: what is refused tells by its step whether the
//! mail is at fault or we are.

use std::{error::Error as _, fs, io, time::Duration};

use lettre::{
    Address,
    transport::smtp::{
        Error,
        authentication::{Credentials, DEFAULT_MECHANISMS},
        client::{AsyncSmtpConnection, Certificate, CertificateStore, TlsParameters},
        commands::{Data, Mail, Rcpt},
        extension::ClientId,
    },
};

use tokio::time::timeout;

use super::{MailError, Unsent};
use crate::config::{MailSettings, MailTls};

/// For the last words to a server.
const GOODBYE: Duration = Duration::from_secs(1);

/// A server that takes mails.
pub(super) struct Smtp {
    host: String,
    port: u16,
    tls: MailTls,
    parameters: Option<TlsParameters>,
    credentials: Option<Credentials>,
    hello: ClientId,
    deadline: Duration,
    reply_deadline: Duration,
}

impl Smtp {
    pub(super) fn new(settings: &MailSettings) -> Result<Self, MailError> {
        let wrong = |key, message: String| MailError::Setting { key, message };
        let (host, port) = settings
            .host_and_port()
            .map_err(|message| wrong("mail.server", message.to_owned()))?;
        let parameters = match settings.tls {
            MailTls::None => None,
            MailTls::StartTls | MailTls::Tls => Some(parameters(&host, settings)?),
        };
        let credentials = (!settings.user.is_empty()).then(|| {
            let password = settings.password.expose().to_owned();
            Credentials::new(settings.user.clone(), password)
        });
        // The domain that we mail from: a name of this machine would tell where it stands.
        let domain = settings
            .from
            .rsplit_once('@')
            .map_or("localhost", |(_, d)| d);
        Ok(Self {
            host,
            port,
            tls: settings.tls,
            parameters,
            credentials,
            hello: ClientId::Domain(domain.to_owned()),
            deadline: settings.deadline,
            reply_deadline: settings.reply_deadline,
        })
    }

    /// Sends a mail over a connection of its own.
    pub(super) async fn send(
        &self,
        from: &Address,
        to: &Address,
        message: &[u8],
    ) -> Result<(), Unsent> {
        let mut connection = None;
        let exchange = async {
            let connection = connection.insert(self.connect().await?);
            announce(connection, from, to).await
        };
        let announced = timeout(self.deadline, exchange).await;
        let sent = match (announced.unwrap_or(Err(Unsent::Silent)), &mut connection) {
            (Ok(()), Some(connection)) => {
                let sent = timeout(self.reply_deadline, connection.message(message)).await;
                match sent {
                    Ok(Ok(_)) => Ok(()),
                    Ok(Err(error)) => Err(its(&error, Unsent::Unanswered)),
                    Err(_) => Err(Unsent::Unanswered),
                }
            }
            (announced, _) => announced,
        };
        // Not within the deadline: what the server has said stands, however slowly it takes leave.
        if let Some(mut connection) = connection {
            let _ = timeout(GOODBYE, connection.abort()).await;
        }
        sent
    }

    async fn connect(&self) -> Result<AsyncSmtpConnection, Unsent> {
        let at_once = match self.tls {
            MailTls::Tls => self.parameters.clone(),
            MailTls::StartTls | MailTls::None => None,
        };
        let server = (&*self.host, self.port);
        let timeout = Some(self.deadline);
        let connected =
            AsyncSmtpConnection::connect_tokio1(server, timeout, &self.hello, at_once, None);
        let mut connection = connected
            .await
            .map_err(|error| ours(&error, Unsent::Unreachable))?;
        if self.tls == MailTls::StartTls {
            let parameters = self.parameters.clone().ok_or(Unsent::Insecure)?;
            if !connection.can_starttls() {
                connection.abort().await;
                return Err(Unsent::Insecure);
            }
            let secured = connection.starttls(parameters, &self.hello).await;
            secured.map_err(|error| ours(&error, Unsent::Insecure))?;
        }
        if let Some(credentials) = &self.credentials {
            let known = connection.auth(DEFAULT_MECHANISMS, credentials).await;
            known.map_err(|error| ours(&error, Unsent::Broken))?;
        }
        Ok(connection)
    }
}

fn parameters(host: &str, settings: &MailSettings) -> Result<TlsParameters, MailError> {
    let wrong = |message: String| MailError::Setting {
        key: "mail.ca_file",
        message,
    };
    let mut builder = TlsParameters::builder(host.to_owned());
    if !settings.ca_file.as_os_str().is_empty() {
        let path = &settings.ca_file;
        let pem = fs::read(path)
            .map_err(|error| wrong(format!("cannot read {}: {error}", path.display())))?;
        // The library takes the first one of a file.
        let all = pem::parse_many(&pem).map_err(|error| wrong(error.to_string()))?;
        let all = all.into_iter().filter(|one| one.tag() == "CERTIFICATE");
        let mut any = false;
        for one in all {
            let certificate = Certificate::from_der(one.into_contents());
            builder = builder
                .add_root_certificate(certificate.map_err(|error| wrong(error.to_string()))?);
            any = true;
        }
        if !any {
            return Err(wrong(format!("{} holds no certificate", path.display())));
        }
        builder = builder.certificate_store(CertificateStore::None);
    }
    builder.build().map_err(|error| wrong(error.to_string()))
}

/// All before the mail itself.
async fn announce(
    connection: &mut AsyncSmtpConnection,
    from: &Address,
    to: &Address,
) -> Result<(), Unsent> {
    let from = Mail::new(Some(from.clone()), Vec::new());
    let accepted = connection.command(from).await;
    accepted.map_err(|error| ours(&error, Unsent::Broken))?;
    let to = Rcpt::new(to.clone(), Vec::new());
    let accepted = connection.command(to).await;
    accepted.map_err(|error| of_recipient(&error))?;
    let accepted = connection.command(Data).await;
    accepted.map_err(|error| its(&error, Unsent::Broken))?;
    Ok(())
}

/// Of the recipient. Servers tell here as well what they think of us: Postfix waits so long with it
/// (`smtpd_delay_reject`). Their enhanced code says which (RFC 3463: 5.7 is of policy), or else the code.
fn of_recipient(error: &Error) -> Unsent {
    let text = error.source().map(ToString::to_string);
    let enhanced = text.as_deref().and_then(enhanced_code);
    match error.status() {
        Some(code) if error.is_permanent() => {
            let code = u16::from(code);
            let is_ours = match enhanced {
                Some(subject) => subject == 7,
                None => matches!(code, 530 | 535 | 554),
            };
            match is_ours {
                true => Unsent::SenderRefused(code),
                false => Unsent::Refused(code),
            }
        }
        _ => its(error, Unsent::Broken),
    }
}

/// The subject of the enhanced code of a refusal for good: 7 of `5.7.1 …`.
fn enhanced_code(text: &str) -> Option<u16> {
    let code = text.split_ascii_whitespace().next()?;
    let mut parts = code.strip_prefix("5.")?.split('.');
    let (subject, detail) = (parts.next()?, parts.next()?);
    detail.parse::<u16>().ok()?;
    subject.parse().ok().filter(|_| parts.next().is_none())
}

/// Of a step before the mail itself: whatever is refused, another mail would be as well.
fn ours(error: &Error, otherwise: Unsent) -> Unsent {
    match error.status() {
        Some(code) if error.is_permanent() => Unsent::SenderRefused(code.into()),
        Some(code) => Unsent::Deferred(code.into()),
        None if error.is_tls() || is_about_certificates(error) => Unsent::Insecure,
        None if error.is_timeout() => Unsent::Silent,
        None => otherwise,
    }
}

/// Where TLS comes first the library takes its failure for one of the connection; rustls says so.
fn is_about_certificates(error: &Error) -> bool {
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(cause) = cause.downcast_ref::<io::Error>() {
            return cause.kind() == io::ErrorKind::InvalidData;
        }
        source = cause.source();
    }
    false
}

/// Of a step with the mail.
fn its(error: &Error, otherwise: Unsent) -> Unsent {
    match error.status() {
        Some(code) if error.is_permanent() => Unsent::Refused(code.into()),
        Some(code) => Unsent::Deferred(code.into()),
        None => otherwise,
    }
}

#[cfg(test)]
mod tests {
    use super::enhanced_code;

    #[test]
    fn an_enhanced_code_is_three_numbers_in_front() {
        for (text, subject) in [
            ("5.7.1 <a@example.com>: Relay access denied", Some(7)),
            ("5.1.1 nobody", Some(1)),
            ("5.7.1", Some(7)),
            ("Relay access denied 5.7.1", None),
            ("4.7.1 come again", None),
            ("5.7 short", None),
            ("5.7.x", None),
            ("5.7.1.2 long", None),
            ("", None),
        ] {
            assert_eq!(enhanced_code(text), subject, "{text}");
        }
    }
}
