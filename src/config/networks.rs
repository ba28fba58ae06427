use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Networks by commas, such as `10.0.0.0/8, fd00::/8`; an address alone is a network of one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Networks(pub Vec<IpNet>);

impl TryFrom<String> for Networks {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let entries = text.split(',').map(str::trim);
        let read = |entry: &str| {
            let one = || entry.parse::<IpAddr>().map(IpNet::from);
            let network = entry.parse().or_else(|_| one());
            network.map_err(|_| format!("{entry:?} is not a network such as 10.0.0.0/8"))
        };
        let networks = entries.filter(|entry| !entry.is_empty()).map(read);
        networks.collect::<Result<_, _>>().map(Self)
    }
}

impl From<Networks> for String {
    fn from(Networks(networks): Networks) -> Self {
        let texts: Vec<_> = networks.iter().map(ToString::to_string).collect();
        texts.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_read_and_written() {
        for (text, written) in [
            ("", ""),
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("127.0.0.1,::1", "127.0.0.1/32, ::1/128"),
            (" fd00::/8 , 10.1.2.3/16,", "fd00::/8, 10.1.2.3/16"),
        ] {
            let networks = Networks::try_from(text.to_owned()).expect("networks");
            assert_eq!(String::from(networks), written);
        }
        for text in ["10.0.0.0/33", "localhost", "10.0.0.0-10.0.0.9", "1.2.3"] {
            let refused = Networks::try_from(text.to_owned()).expect_err(text);
            assert!(refused.contains("not a network"), "{refused}");
        }
    }
}
