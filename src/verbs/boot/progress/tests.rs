use uuid::Uuid;

use super::{super::opened::Evidence, *};
use crate::{
    sys::device::{Device, DeviceKind, Identity},
    unlock::pins::Pins,
    volumes::header::{Format, Geometry, Header, HeaderImage, LuksHeader, SectorSize, Volume},
};

const STORES: &str = "[stores.a]\ntype = 'directory'\npath = 'a'\nowner = 'o.pem'\nno_escrow = true\n\
                      [stores.b]\ntype = 'directory'\npath = 'b'\nowner = 'o.pem'\nno_escrow = true\n";

/// The id of every key here; `Story::told` shortens it.
const KEY: &str = "6f1c9d2e-3b4a-4c5d-8e6f-7a8b9c0d1e2f";

/// A boot that begins now, may take 60 s, and asks a person after 5 s.
struct Story {
    progress: Progress,
    start: Instant,
}

impl Story {
    fn of(volumes: &[&str]) -> Self {
        Self::with("", volumes)
    }

    fn with(settings: &str, volumes: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        let boot = "[boot]\nprompt_after_seconds = 5.0\ntotal_seconds = 60.0\n";
        let volumes = volumes.iter().map(|name| {
            format!("[[boot.volumes]]\nname = '{name}'\ndevice = 'LABEL={name}'\nkeys = ['a/{KEY}', 'b/{KEY}']\n")
        });
        std::fs::write(&path, format!("{boot}{}{STORES}{settings}", volumes.collect::<String>())).unwrap();
        let config = Config::read(&path).unwrap();
        let planned = super::super::plan(&config, None, super::super::Which::Later);
        let start = Instant::now();
        Self { progress: Progress::new(Arc::new(config), planned, start), start }
    }

    /// The boot does not wait for this volume's device.
    fn optional(mut self, name: &str) -> Self {
        let number = self.number(name);
        self.progress.volumes[number].planned.optional = true;
        self
    }

    fn number(&self, name: &str) -> VolumeNo {
        let is_it = |(_, awaited): &(VolumeNo, &Awaited)| awaited.planned.name.as_str() == name;
        self.progress.volumes.iter().find(is_it).unwrap().0
    }

    fn at(&self, seconds: f64) -> Instant {
        self.start + Duration::from_secs_f64(seconds)
    }

    fn take(&mut self, seconds: f64, change: Change) -> Vec<String> {
        let now = self.at(seconds);
        let actions = self.progress.take(change, now);
        actions.iter().map(|action| self.told(action)).collect()
    }

    fn found(&mut self, seconds: f64, name: &str, volume: Volume) -> Vec<String> {
        let number = self.number(name);
        let found = FoundVolume::new(volume, &self.progress.volumes[number].planned, &Pins::of(&self.progress.config));
        self.take(seconds, Change::Found(number, Arc::new(found)))
    }

    fn failed(&mut self, seconds: f64, name: &str, by: OpenedBy) -> Vec<String> {
        let number = self.number(name);
        self.take(seconds, Change::Failed(number, by, broken()))
    }

    fn attached(&mut self, seconds: f64, name: &str, by: OpenedBy) -> Vec<String> {
        let number = self.number(name);
        self.take(seconds, Change::Attached(number, opened(by)))
    }

    fn tried(&mut self, seconds: f64, name: &str, tried: Result<(), Error>) -> Vec<String> {
        let number = self.number(name);
        self.take(seconds, Change::Tried(number, tried.map(|()| opened(OpenedBy::Passphrase))))
    }

    fn unproven(&self) -> Vec<String> {
        self.names(&self.progress.unproven())
    }

    /// The person answers the prompt that is shown.
    fn answered(&mut self, seconds: f64, answer: Option<&str>) -> Vec<String> {
        let answer = answer.map(|answer| SecretBytes::copy_of(answer.as_bytes()).unwrap());
        let prompt = self.progress.prompt;
        self.take(seconds, Change::Answered(prompt, answer))
    }

    fn tick(&mut self, seconds: f64) -> Option<String> {
        let now = self.at(seconds);
        self.progress.tick(now).map(|action| self.told(&action))
    }

    fn is_over(&self, seconds: f64) -> bool {
        self.progress.is_over(self.at(seconds))
    }

    fn left(&self) -> Vec<String> {
        self.names(&self.progress.left())
    }

    fn names(&self, volumes: &[VolumeNo]) -> Vec<String> {
        volumes.iter().map(|number| self.progress.volumes[*number].planned.name.to_string()).collect()
    }

    /// An action in words.
    fn told(&self, action: &Action) -> String {
        let name = |number: &VolumeNo| self.names(&[*number]).remove(0);
        let told = match action {
            Action::Ask(number, _, by) => format!("ask {by} for {}", name(number)),
            Action::Try(number, _, passphrase) => {
                format!("try {} on {}", String::from_utf8_lossy(passphrase.expose()), name(number))
            }
            Action::ShowPrompt(_, volumes, question) => {
                let question = question.as_ref().map(|question| format!("; {question}")).unwrap_or_default();
                format!("prompt for {}{question}", self.names(volumes).join(", "))
            }
            Action::Answer(answer) => {
                let answer = answer.as_ref().map(|answer| String::from_utf8_lossy(answer.expose()).into_owned());
                format!("answer {}", answer.as_deref().unwrap_or("nothing"))
            }
            Action::PromptAnswered => "prompt answered".to_owned(),
            Action::TakePromptAway => "no prompt".to_owned(),
            Action::TellAttached(number, opened) => format!("{} by {}", name(number), opened.by),
            Action::TellFailed(number, by, error) => format!("{} not by {by}: {error}", name(number)),
            Action::TellWrongPassphrase(number) => format!("wrong for {}", name(number)),
            Action::TellNotOurs(number, _) => format!("{} is not ours", name(number)),
        };
        told.replace(KEY, "1")
    }
}

fn volume(asks_people: bool) -> Volume {
    let device = Device {
        path: "/dev/vdb".into(),
        kind: DeviceKind::Block(1),
        identity: Identity::BlockDevice { number: 1, sequence: None },
        size_bytes: 1 << 30,
        read_only: false,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
    };
    let header = LuksHeader {
        format: Format::Luks2,
        uuid: Uuid::nil(),
        digest: String::new(),
        reference: None,
        clevis: Vec::new(),
        asks_people,
        keyslots: Vec::new(),
        detached: None,
        image: HeaderImage::empty(4096).unwrap(),
        keyslots_in: None,
    };
    let geometry =
        Geometry { sector_size: SectorSize::B512, data_offset_bytes: 0, size_bytes: 1 << 30, iv_offset_sectors: 0 };
    Volume { device, header: Header::Luks(header), geometry, key_size: None, rest: None }
}

/// A volume that a person has a passphrase of.
fn with_passphrase() -> Volume {
    volume(true)
}

/// As the sources would have it: only a sealed key is a proof.
fn opened(by: OpenedBy) -> Opened {
    let proven = matches!(by, OpenedBy::Store(_) | OpenedBy::Lockbox(_));
    let measured = (by != OpenedBy::Before).then(|| "cryptsetup:measured".to_owned());
    Opened { by, evidence: Evidence { proven, measured, header: None } }
}

fn store(name: &str) -> OpenedBy {
    OpenedBy::Store(format!("{name}/{KEY}").parse().unwrap())
}

fn broken() -> Error {
    Error::Usage("broken".to_owned())
}

fn wrong_passphrase() -> Error {
    VolumeError::WrongPassphrase { path: "/dev/vdb".into() }.into()
}

#[test]
fn all_keys_of_a_volume_are_asked_for_at_once_and_the_first_ends_the_boot() {
    let mut story = Story::of(&["root"]);
    assert_eq!(story.found(1.0, "root", volume(false)), ["ask a/1 for root", "ask b/1 for root"]);
    assert!(!story.is_over(1.0));
    assert_eq!(story.attached(2.0, "root", store("b")), ["no prompt", "root by b/1"]);
    assert!(story.is_over(2.0) && story.left().is_empty());
}

#[test]
fn a_key_that_is_listed_twice_is_asked_for_once_and_the_lockbox_first() {
    let lockbox = "[lockbox]\nhost = 'h'\nstore = 'a'\nidentities = ['h.key']\n";
    let mut story = Story::with(lockbox, &["root"]);
    let number = story.number("root");
    story.progress.volumes[number].planned.keys = vec![format!("a/{KEY}").parse().unwrap(); 2];
    assert_eq!(story.found(1.0, "root", volume(false)), ["ask a/1 with the lockbox for root"]);
}

#[test]
fn the_last_source_that_fails_gives_the_volume_up() {
    let mut story = Story::of(&["root"]);
    story.found(1.0, "root", volume(false));
    assert_eq!(story.failed(2.0, "root", store("a")), ["root not by a/1: broken"]);
    assert!(!story.is_over(2.0));
    story.failed(3.0, "root", store("b"));
    assert!(story.is_over(3.0));
    assert_eq!(story.left(), ["root"]);
    assert!(story.progress.too_late(|_| None).is_empty(), "all have said why");
}

#[test]
fn a_source_that_fails_after_another_has_attached_the_volume_changes_nothing() {
    let mut story = Story::of(&["root"]);
    story.found(1.0, "root", with_passphrase());
    story.attached(2.0, "root", store("a"));
    story.failed(3.0, "root", store("b"));
    assert!(story.left().is_empty() && story.progress.prompt_due().is_none());
}

#[test]
fn a_volume_without_a_key_is_given_up_at_once() {
    let mut story = Story::of(&["root"]);
    let number = story.number("root");
    story.progress.volumes[number].planned.keys.clear();
    let told = story.found(1.0, "root", volume(false));
    assert!(matches!(&told[..], [only] if only.starts_with("root not by device: ")), "{told:?}");
    assert!(story.is_over(1.0));
}

#[test]
fn a_header_that_is_not_ours_is_left_to_the_distribution() {
    let mut story = Story::of(&["root", "data"]);
    let number = story.number("data");
    assert_eq!(story.take(1.0, Change::NotOurs(number, None)), ["data is not ours"]);
    assert!(!story.is_over(1.0));
    story.attached(2.0, "root", OpenedBy::Before);
    assert!(story.is_over(2.0) && story.left().is_empty());
}

#[test]
fn a_person_is_asked_for_the_volumes_that_have_a_passphrase_some_time_after_the_first_was_found() {
    let mut story = Story::of(&["root", "data", "keys", "late"]);
    assert!(story.progress.prompt_due().is_none(), "no device is there");
    story.found(1.0, "keys", volume(false));
    assert!(story.progress.prompt_due().is_none(), "nobody has a passphrase of it");
    story.found(2.0, "root", with_passphrase());
    story.found(4.0, "data", with_passphrase());
    assert_eq!(story.progress.prompt_due(), Some(story.at(7.0)));
    assert_eq!(story.tick(6.9), None);
    assert_eq!(story.tick(7.0).unwrap(), "prompt for root, data");
    assert!(story.progress.is_asking() && story.progress.prompt_due().is_none());
}

#[test]
fn the_prompt_goes_when_the_last_volume_that_it_is_for_is_attached() {
    let mut story = Story::of(&["root", "data"]);
    story.found(0.0, "root", with_passphrase());
    story.found(0.0, "data", with_passphrase());
    story.tick(5.0).unwrap();
    let shown = story.progress.prompt;
    assert_eq!(story.attached(6.0, "root", store("a")), ["root by a/1"]);
    assert_eq!(story.attached(7.0, "data", store("a")), ["no prompt", "data by a/1"]);
    let secret = SecretBytes::copy_of(b"late").unwrap();
    assert!(story.take(8.0, Change::Answered(shown, Some(secret))).is_empty(), "its prompt has gone");
}

#[test]
fn after_an_empty_answer_the_prompt_is_shown_again_a_second_later() {
    let mut story = Story::of(&["root"]);
    story.found(0.0, "root", with_passphrase());
    story.tick(5.0).unwrap();
    assert_eq!(story.answered(8.0, Some("")), ["prompt answered"]);
    assert_eq!(story.tick(8.9), None);
    assert_eq!(story.tick(9.0).unwrap(), "prompt for root");
}

#[test]
fn a_prompt_that_cannot_be_shown_is_not_tried_again() {
    let mut story = Story::of(&["root"]);
    story.found(0.0, "root", with_passphrase());
    story.tick(5.0).unwrap();
    story.answered(5.0, None);
    assert_eq!(story.tick(59.0), None);
    assert!(!story.is_over(59.0), "the sources go on");
}

#[test]
fn a_passphrase_is_tried_on_all_volumes_and_asked_for_again_where_it_is_wrong() {
    let mut story = Story::of(&["root", "data"]);
    story.found(0.0, "root", with_passphrase());
    story.found(0.0, "data", with_passphrase());
    story.tick(5.0).unwrap();
    let told = story.answered(6.0, Some("secret"));
    assert_eq!(told, ["prompt answered", "try secret on root", "try secret on data"]);
    assert_eq!(story.tick(7.0), None, "it is still being tried");
    assert_eq!(story.tried(8.0, "data", Err(wrong_passphrase())), ["wrong for data"]);
    assert_eq!(story.tick(8.0), None, "root is still being tried");
    assert_eq!(story.tried(9.0, "root", Ok(())), ["root by passphrase"]);
    assert_eq!(story.tick(9.0).unwrap(), "prompt for data");
}

#[test]
fn a_volume_that_only_a_person_can_open_is_waited_for_while_they_are_asked() {
    let mut story = Story::of(&["root"]);
    story.found(0.0, "root", with_passphrase());
    story.tick(5.0).unwrap();
    story.failed(6.0, "root", store("a"));
    story.failed(6.0, "root", store("b"));
    assert!(!story.is_over(6.0));
    story.answered(7.0, Some("secret"));
    assert!(!story.is_over(7.0), "the passphrase is being tried");
    story.tried(8.0, "root", Err(wrong_passphrase()));
    assert!(story.is_over(8.0), "the distribution asks as well");
    assert_eq!(story.left(), ["root"]);
}

#[test]
fn an_optional_volume_may_be_absent_but_not_without_its_key() {
    let mut story = Story::of(&["root", "stick"]).optional("stick");
    story.attached(1.0, "root", store("a"));
    assert!(story.is_over(1.0) && story.left().is_empty());
    assert!(story.progress.too_late(|_| None).is_empty());
    story.found(1.0, "stick", volume(false));
    assert!(!story.is_over(1.0));
    assert_eq!(story.left(), ["stick"]);
}

#[test]
fn at_the_deadline_what_has_not_answered_is_why_a_volume_is_left() {
    let mut story = Story::of(&["root", "data", "home"]);
    story.found(1.0, "root", with_passphrase());
    story.found(1.0, "data", volume(false));
    story.failed(2.0, "data", store("b"));
    assert!(!story.is_over(59.9) && story.is_over(60.0));
    assert_eq!(story.left(), ["root", "data", "home"]);
    let data = story.number("data");
    let late = story.progress.too_late(|number| (number == data).then(|| "a route to 10.0.0.1".to_owned()));
    let told: Vec<String> = late.iter().map(|action| story.told(action)).collect();
    assert_eq!(
        told,
        [
            "root not by a/1: the key a/1 did not appear within 60 s",
            "root not by b/1: the key b/1 did not appear within 60 s",
            "data not by a/1: a route to 10.0.0.1 did not appear within 60 s",
            "home not by device: the header on LABEL=home did not appear within 60 s",
        ]
    );
}

#[test]
fn only_volumes_that_their_sealed_keys_opened_are_proven() {
    let names = ["root", "typed", "before", "foreign", "failed", "absent", "late"];
    let mut story = Story::of(&names).optional("absent");
    for name in ["root", "typed", "failed", "late"] {
        story.found(1.0, name, with_passphrase());
    }
    assert_eq!(story.unproven(), names, "nothing is opened yet");
    story.attached(2.0, "root", store("a"));
    story.attached(2.0, "before", OpenedBy::Before);
    let foreign = story.number("foreign");
    story.take(2.0, Change::NotOurs(foreign, None));
    story.failed(2.0, "failed", store("a"));
    story.failed(2.0, "failed", store("b"));
    story.tick(6.0).unwrap();
    story.answered(7.0, Some("secret"));
    story.tried(8.0, "typed", Ok(()));
    assert_eq!(story.unproven(), ["typed", "before", "foreign", "failed", "absent", "late"]);
    // What is opened is measured, proven or not.
    let event = story.progress.event();
    let words: Vec<&str> = event.split(' ').skip(5).collect();
    let measured = "cryptsetup:measured";
    let unknown = ["unknown:before", "unknown:foreign", "unknown:failed", "unknown:absent", "unknown:late"];
    assert_eq!(words, [&[measured, measured][..], &unknown].concat());
}

#[test]
fn a_boot_that_opens_all_by_sealed_keys_has_proven_all() {
    let mut story = Story::of(&["root", "data"]);
    story.attached(1.0, "root", store("a"));
    assert_eq!(story.unproven(), ["data"]);
    story.attached(2.0, "data", OpenedBy::Lockbox(format!("b/{KEY}").parse().unwrap()));
    assert!(story.unproven().is_empty());
    assert!(Story::of(&[]).unproven().is_empty(), "what none planned means, the end of the boot decides");
}

#[test]
fn a_leaf_that_a_person_opens_is_asked_for_by_the_same_prompt() {
    let mut story = Story::of(&["root"]);
    story.found(0.0, "root", volume(false));
    assert_eq!(story.tick(9.0), None, "no keyslot is for people, and no leaf is asked for");
    assert_eq!(story.take(10.0, Change::Wanted("words?".to_owned())), [""; 0]);
    assert_eq!(story.tick(10.0).unwrap(), "prompt for ; words?");
    assert_eq!(story.answered(12.0, Some("")), ["prompt answered"]);
    assert_eq!(story.tick(12.5), None, "not at once");
    assert_eq!(story.tick(13.0).unwrap(), "prompt for ; words?");
    assert_eq!(story.answered(20.0, Some("wrong")), ["prompt answered", "answer wrong"]);
    assert_eq!(story.tick(23.0), None, "nobody asks");
    story.take(23.0, Change::Wanted("again?".to_owned()));
    assert_eq!(story.tick(23.0).unwrap(), "prompt for ; again?");
    // A server answers after all.
    assert_eq!(story.take(24.0, Change::NotWanted("again?".to_owned())), ["no prompt"]);
    assert_eq!(story.attached(25.0, "root", store("a")), ["no prompt", "root by a/1"]);
    assert!(story.is_over(25.0));
}

#[test]
fn an_answer_is_for_keyslots_and_leaves_alike() {
    let mut story = Story::of(&["root"]);
    story.found(0.0, "root", with_passphrase());
    story.take(1.0, Change::Wanted("words?".to_owned()));
    assert_eq!(story.tick(1.0).unwrap(), "prompt for root; words?");
    assert_eq!(story.answered(2.0, Some("typed")), ["prompt answered", "answer typed", "try typed on root"]);
    assert_eq!(story.tried(2.5, "root", Err(wrong_passphrase())), ["wrong for root"]);
    assert_eq!(story.tick(3.0), None, "the leaf is being tried");
    assert_eq!(story.attached(3.5, "root", store("a")), ["no prompt", "root by a/1"]);
    // Where nobody can answer, those who wait are told.
    let mut story = Story::of(&["root"]);
    story.found(0.0, "root", volume(false));
    story.take(1.0, Change::Wanted("words?".to_owned()));
    story.tick(1.0).unwrap();
    assert_eq!(story.answered(1.5, None), ["prompt answered", "answer nothing"]);
    assert_eq!(story.tick(30.0), None);
}
