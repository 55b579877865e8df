require_relative '../../../lib/community/app_handler'

# Certification tests of every SuperNode appliance. The SuperLink of metadata.yaml does not answer;
# the node runs and retries forever.
describe 'Appliance Certification' do
    include_context('vm_handler')

    # Repeats the command until its output matches or the time is over; returns the last output.
    def answer_of(command, wanted, seconds)
        limit = Time.now + seconds
        loop do
            answer = @info[:vm].ssh(command).stdout.to_s.strip
            return answer if answer.match?(wanted) || Time.now > limit

            sleep 5
        end
    end

    it 'flower-supernode service is active' do
        answer = answer_of('systemctl is-active flower-supernode.service', /\Aactive\z/, 600)
        expect(answer).to eq('active')
    end

    it 'docker service is running' do
        expect(answer_of('systemctl is-active docker.service', /\Aactive\z/, 60)).to eq('active')
    end

    it 'flower-supernode container is running' do
        running = "docker inspect -f '{{.State.Running}}' flower-supernode"
        answer = answer_of(running, /\Atrue\z/, 120)
        expect(answer).to eq('true')
    end

    # Installed by the package.
    it 'flower-supernode systemd unit file exists' do
        @info[:vm].ssh('systemctl cat flower-supernode.service').expect_success
    end

    it 'service report file exists' do
        @info[:vm].ssh('test -s /etc/one-appliance/config').expect_success
    end

    it 'check oneapps motd' do
        answer = answer_of('cat /etc/motd', /All set and ready to serve/, 600)
        expect(answer).to include('All set and ready to serve')
    end
end
